"""The result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifact.staging import Staging
from exporter.plan.export_plan import ExportPlan
from exporter.tokens.windows import Windows
from exporter.verify.gate import Verification


@dataclass(frozen=True)
class Verified:
    """What verification brings back, beside the verdicts.

    Attributes:
        drawn: the windows that were drawn because a verdict was undecided; None if none were.
        pack: the staged reference pack; None if none is kept.
    """

    drawn: Windows | None = None
    pack: Staging | None = None


@dataclass(frozen=True)
class FolderResult:
    """What became of one output folder.

    Attributes:
        path: where it is: the output path if published, else `OUT.rejected`.
        published: whether the gate passed (or was skipped on request).
        manifest: its `export.json`.
        verdicts: by artifact label; empty if verification was skipped.
    """

    path: Path
    published: bool
    manifest: Mapping[str, Any]
    verdicts: Mapping[str, Verification]


@dataclass(frozen=True)
class ExportResult:
    """What became of a run.

    Attributes:
        plan: what was planned.
        folders: what became of each output folder, in the order of the recipe.
        reference: where the reference pack is, if one was kept.
    """

    plan: ExportPlan
    folders: tuple[FolderResult, ...]
    reference: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether every folder was published."""
        return all(folder.published for folder in self.folders)
