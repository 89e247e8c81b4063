"""One output folder on its way through the pipeline, from an empty staging folder to a published one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.staging import Staging
from exporter.backends.output_plan import OutputPlan
from exporter.errors import RefusalError
from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.verify.gate import Verification

if TYPE_CHECKING:
    from exporter.backends.base import WriteResult


@dataclass(eq=False)
class Job:
    """One output folder; each step of the pipeline adds its own.

    Attributes:
        plan: the folder's plan.
        staging: where its files are until they are published.
        written: by artifact label, the result of the tour.
        files: size and SHA-256 of every file that the tour wrote and of the small ones beside it, by name.
        verdicts: by artifact label; empty until it is verified, and without verification.
    """

    plan: FolderPlan
    staging: Staging
    written: Mapping[str, WriteResult] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    verdicts: Mapping[str, Verification] = field(default_factory=dict)

    def entry(self, artifact: OutputPlan) -> Path:
        """The path that a runtime loads: a file, or the folder itself."""
        return self.staging.files if artifact.entry == "." else self.staging.files / artifact.entry

    @property
    def passed(self) -> bool:
        """Whether nothing keeps it from being published."""
        return all(verification.passed for verification in self.verdicts.values())


def open_jobs(plan: ExportPlan, keys: Sequence[str], stack: ExitStack) -> list[Job]:
    """A job for each output folder of a run; `stack` closes their staging folders.

    Args:
        plan: the run's plan.
        keys: for each folder, what its staging folder is for; see `staging_key`.
        stack: ends the jobs.

    Raises:
        RefusalError: another run is at one of them; what an earlier run of this plan left stays, what is new goes.
    """
    jobs: list[Job] = []
    try:
        for folder, key in zip(plan.folders, keys, strict=True):
            jobs.append(Job(folder, Staging(folder.out, key, force=plan.recipe.force)))
            stack.callback(jobs[-1].staging.close)
    except RefusalError:
        discard_new(jobs)
        raise
    return jobs


def discard_new(jobs: Sequence[Job]) -> None:
    """Remove the staging folders that no earlier run left."""
    for job in jobs:
        if not job.staging.resumed:
            job.staging.discard()
