"""plan → open → tour → verify → publish, in one screen: `export` is the whole flow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from exporter.artifact.hashing import InputHasher
from exporter.errors import NotEnoughMemoryError, RefusalError
from exporter.pipeline.job import Job, discard_new, open_jobs
from exporter.pipeline.plan import make_plan
from exporter.pipeline.publish import finish_files, publish, staging_key
from exporter.pipeline.result import ExportResult
from exporter.pipeline.verify import verify
from exporter.plan.export_plan import ExportPlan
from exporter.plan.reporter import Reporter
from exporter.plan.resources import memory_errors
from exporter.recipe import Execution, Recipe

if TYPE_CHECKING:
    from exporter.pipeline.tour import Toured


@memory_errors()
def export(recipe: Recipe, execution: Execution | None = None, reporter: Reporter | None = None) -> ExportResult:
    """Merge, write, verify and publish.

    A failed gate is a result, not an exception: look at `passed`.

    Args:
        recipe: what to export.
        execution: how to run; by default on the best device, on all cores.
        reporter: told what happens; by default nothing is printed.

    Raises:
        RefusalError: arguments or inputs are wrong; nothing is left written.
        OutOfMemoryError: memory ran out on the way, against the estimate; the staging folder is kept.
        ExporterError: something else failed on the way; likewise, and the same call goes on from it.
    """
    execution, reporter = execution or Execution(), reporter or Reporter()
    plan = make_plan(recipe, execution)
    reporter.planned(plan)
    with ExitStack() as stack:
        jobs = open_jobs(plan, [staging_key(plan, folder) for folder in plan.folders], stack)
        toured = _tour(plan, jobs, reporter)
        for job in jobs:
            finish_files(plan, job)
        verified = verify(plan, jobs, toured, reporter, stack)
        return publish(plan, jobs, toured, verified)


def _tour(plan: ExportPlan, jobs: Sequence[Job], reporter: Reporter) -> Toured:
    """Read, merge and write everything; clean up where that is refused."""
    try:
        with closing(InputHasher()) as hasher:
            # The first shard is hashed while torch is imported, which keeps one core busy for seconds.
            hasher.reach(plan.model.tensors[0].source.file)
            from exporter.pipeline.tour import run_tour

            return run_tour(plan, jobs, hasher, reporter)
    except NotEnoughMemoryError:
        # Of the device, found before anything was done: what an earlier run left is not wrong for it.
        discard_new(jobs)
        raise
    except RefusalError:
        # The inputs turned out to be wrong on the way (a NaN in the base, say): leave nothing behind.
        for job in jobs:
            job.staging.discard()
        raise
