"""The calls by which the pipeline reports progress. The base class is silent; the command line's draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.plan.export_plan import ExportPlan
    from exporter.tokens.windows import Windows


class Reporter:
    """Does nothing. Override the methods that you want to hear."""

    def planned(self, plan: ExportPlan) -> None:
        """The plan stands; nothing has been written yet."""

    def touring(self, plan: ExportPlan, device: str, *, resumed: bool) -> None:
        """Merging and writing begins on `device`, anew or from an earlier run's work."""

    def read(self, nbytes: int) -> None:
        """So many more bytes of the base are merged and written."""

    def toured(self) -> None:
        """Every tensor is written."""

    def walking(self, windows: Windows) -> None:
        """The walk of the reference's layers begins."""

    def layer(self, done: int, layers: int) -> None:
        """So many of the layers are done."""

    def scoring(self, what: str, windows: Windows) -> None:
        """Scoring of the reference or of an artifact begins."""

    def doing(self, what: str) -> None:
        """A step without a count begins: reading weights back, or asking for answers."""

    def window(self, count: int) -> None:
        """So many more windows are scored."""

    def scored(self) -> None:
        """Everything is scored."""
