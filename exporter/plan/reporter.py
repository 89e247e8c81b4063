"""What the pipeline tells whoever watches. The base class says nothing; the command line has one that draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.plan.export_plan import ExportPlan
    from exporter.tokens.windows import Windows


class Reporter:
    """Silent reporter; override what you want to hear about."""

    def planned(self, plan: ExportPlan) -> None:
        """The plan stands; nothing has been written yet."""

    def touring(self, plan: ExportPlan, device: str, *, resumed: bool) -> None:
        """Merging and writing begins on `device`, anew or from an earlier run's work."""

    def read(self, nbytes: int) -> None:
        """That many more bytes of the base are merged and written."""

    def toured(self) -> None:
        """Every tensor is written."""

    def walking(self, windows: Windows) -> None:
        """The walk of the reference's layers begins."""

    def layer(self, done: int, layers: int) -> None:
        """That many of the layers are done."""

    def scoring(self, what: str, windows: Windows) -> None:
        """Scoring of the reference or of an artifact begins."""

    def doing(self, what: str) -> None:
        """Something begins that is not counted: reading weights back, or asking for answers."""

    def window(self, count: int) -> None:
        """That many more windows are scored."""

    def scored(self) -> None:
        """Everything is scored."""
