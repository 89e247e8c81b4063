"""plan → tour → stage → verify → publish, in one screen: `export` is the whole flow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.durable import json_document, write_durably
from exporter.artifact.file_records import MANIFEST_NAME
from exporter.artifact.hashing import InputHasher
from exporter.artifact.staging import Staging
from exporter.errors import NotEnoughMemoryError, RefusalError
from exporter.pipeline.plan import make_plan
from exporter.pipeline.publish import finish_files, stage_pack, staging_key
from exporter.pipeline.result import ExportResult, FolderResult
from exporter.pipeline.verify import answer_artifacts, verify_artifacts
from exporter.plan.export_plan import ExportPlan
from exporter.plan.reporter import Reporter
from exporter.plan.resources import memory_errors
from exporter.publish.manifest import build_manifest, input_files
from exporter.publish.model_card import CARD_NAME, BaseCard, model_card
from exporter.publish.report.html import REPORT_NAME, report_html
from exporter.recipe import Execution, Recipe
from exporter.verify.gate import Verification

if TYPE_CHECKING:
    from exporter.pipeline.tour import Toured
    from exporter.tokens.windows import Windows


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
        stagings = _open_stagings(plan, stack)
        try:
            inputs, toured = _tour(plan, stagings, reporter)
        except NotEnoughMemoryError:
            # Of the device, found before anything was done: what an earlier run left is not wrong for it.
            _discard_new(stagings)
            raise
        except RefusalError:
            # The inputs turned out to be wrong on the way (a NaN in the base, say): leave nothing behind.
            for staging in stagings:
                staging.discard()
            raise
        outputs = [
            finish_files(plan, folder, staging, written)
            for folder, staging, written in zip(plan.folders, stagings, toured.written, strict=True)
        ]
        staged = [(folder, staging.files) for folder, staging in zip(plan.folders, stagings, strict=True)]
        verdicts: list[dict[str, Verification]] = [{} for _ in staged]
        drawn: Windows | None = None
        pack: Staging | None = None
        if toured.reference is not None:
            checksums = [{label: one.checksums for label, one in written.items()} for written in toured.written]
            verified = verify_artifacts(
                plan, staged, checksums, toured.reference, toured.device, reporter, scratch=stagings[0].scratch
            )
            verdicts, drawn = verified.verdicts, verified.drawn
            pack = stage_pack(plan, verified.reference, toured.device, inputs, stack)
            # With it go the states of what was drawn.
            del verified
            if plan.recipe.evaluation.answers:
                verdicts = answer_artifacts(plan, staged, verdicts, toured.device, reporter)
        results, base_card = [], BaseCard.of(plan)
        for number, (folder, staging) in enumerate(zip(plan.folders, stagings, strict=True)):
            kind, written = toured.device.partition(":")[0], toured.written[number]
            manifest = build_manifest(plan, folder, inputs, outputs[number], written, verdicts[number], kind, drawn)
            write_durably(staging.files / CARD_NAME, model_card(manifest, base_card))
            write_durably(staging.files / MANIFEST_NAME, json_document(manifest))
            write_durably(staging.files / REPORT_NAME, report_html(manifest))
            published = all(verification.passed for verification in verdicts[number].values())
            path = staging.publish() if published else staging.reject()
            results.append(FolderResult(path, published, manifest, verdicts[number]))
        # It is of the trained model, so it is kept whatever became of the outputs.
        kept = pack.publish() if pack else None
    return ExportResult(plan, tuple(results), kept)


def _open_stagings(plan: ExportPlan, stack: ExitStack) -> list[Staging]:
    stagings: list[Staging] = []
    try:
        for folder in plan.folders:
            stagings.append(Staging(folder.out, staging_key(plan, folder), force=plan.recipe.force))
            stack.callback(stagings[-1].close)
    except RefusalError:
        # Another run is at one of them: what an earlier run of this plan left stays, what is new goes.
        _discard_new(stagings)
        raise
    return stagings


def _discard_new(stagings: Sequence[Staging]) -> None:
    for staging in stagings:
        if not staging.resumed:
            staging.discard()


def _tour(plan: ExportPlan, stagings: Sequence[Staging], reporter: Reporter) -> tuple[dict[Path, str], Toured]:
    """Read, merge and write everything; returns the hash of every input file, and what the tour brought back."""
    with closing(InputHasher()) as hasher:
        # The first shard is hashed while torch is imported, which keeps one core busy for seconds.
        hasher.reach(plan.model.tensors[0].source.file)
        from exporter.pipeline.tour import run_tour

        toured = run_tour(plan, stagings, hasher, reporter)
        return hasher.finish(path for _, path in input_files(plan)), toured
