"""plan → tour → stage → verify → publish, in one screen: `export` is the whole flow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact.manifest import MANIFEST_NAME, build_manifest, dump, input_files
from exporter.artifact.model_card import CARD_NAME, BaseCard, model_card
from exporter.artifact.staging import Staging, copy_durably, write_durably
from exporter.errors import NotEnoughMemoryError, RefusalError
from exporter.hashing import InputHasher, hash_all
from exporter.plan import ExportPlan, FolderPlan, make_plan
from exporter.recipe import Execution, Recipe
from exporter.report.html import REPORT_NAME, report_html
from exporter.reporter import Reporter
from exporter.room import memory_errors
from exporter.verify.answers.run import answer_artifacts
from exporter.verify.check import verify_artifacts
from exporter.verify.gate import Verification

if TYPE_CHECKING:
    from exporter.calibration import Windows
    from exporter.tour.drive import Toured, Written
    from exporter.verify.reference import Reference


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
            _finish_files(plan, folder, staging, written)
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
            pack = _stage_pack(plan, verified.reference, toured.device, inputs, stack)
            # With it go the states of what was drawn.
            del verified
            if plan.recipe.evaluation.answers:
                verdicts = answer_artifacts(plan, staged, verdicts, toured.device, reporter)
        results, base_card = [], BaseCard.of(plan)
        for number, (folder, staging) in enumerate(zip(plan.folders, stagings, strict=True)):
            kind, written = toured.device.partition(":")[0], toured.written[number]
            manifest = build_manifest(plan, folder, inputs, outputs[number], written, verdicts[number], kind, drawn)
            write_durably(staging.files / CARD_NAME, model_card(manifest, base_card))
            write_durably(staging.files / MANIFEST_NAME, dump(manifest))
            write_durably(staging.files / REPORT_NAME, report_html(manifest))
            published = all(verification.passed for verification in verdicts[number].values())
            path = staging.publish() if published else staging.reject()
            results.append(FolderResult(path, published, manifest, verdicts[number]))
        # It is of the trained model, so it is kept whatever became of the outputs.
        kept = pack.publish() if pack else None
    result = ExportResult(plan, tuple(results), kept)
    reporter.finished(result)
    return result


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


def _stage_pack(
    plan: ExportPlan, reference: Reference, device: str, inputs: Mapping[Path, str], stack: ExitStack
) -> Staging | None:
    """Write the reference pack that was asked for, so that nothing but a rename is left to do."""
    if plan.pack is None:
        return None
    from exporter.verify.packing import STAGING_KEY, write_pack

    staging = Staging(plan.pack.out, STAGING_KEY, force=plan.recipe.force)
    stack.callback(staging.close)
    write_pack(plan.pack, reference, inputs, staging, device, plan.threads)
    return staging


def staging_key(plan: ExportPlan, folder: FolderPlan) -> str:
    """Identifies what a staging folder is for: inputs by size and time, plan, options, versions and kind of device."""
    inputs = [
        (role, path.name, path.stat().st_size, path.stat().st_mtime_ns) for role, path in sorted(input_files(plan))
    ]
    artifacts = [
        (
            artifact.label,
            [(file.name, file.nbytes, hashlib.sha256(file.header).hexdigest()) for file in artifact.files],
            {name: hashlib.sha256(content).hexdigest() for name, content in artifact.documents.items()},
        )
        for artifact in folder.artifacts
    ]
    tokens = [sets.sha256 if sets else None for sets in (plan.tokens.evaluation, plan.tokens.calibration)]
    how = [plan.execution.device.partition(":")[0], plan.recipe.compute_dtype, tokens]
    versions = {package: version(package) for package in ("exporter", "torch", "llama-cpp-python")}
    options = {key: str(value) for key, value in folder.options.items()}
    text = json.dumps([inputs, artifacts, versions, how, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tour(plan: ExportPlan, stagings: Sequence[Staging], reporter: Reporter) -> tuple[dict[Path, str], Toured]:
    """Read, merge and write everything; returns the hash of every input file, and what the tour brought back."""
    with closing(InputHasher()) as hasher:
        # The first shard is hashed while torch is imported, which keeps one core busy for seconds.
        hasher.reach(plan.model.tensors[0].source.file)
        from exporter.tour.drive import run_tour

        toured = run_tour(plan, stagings, hasher, reporter)
        return hasher.finish(path for _, path in input_files(plan)), toured


def _finish_files(
    plan: ExportPlan, folder: FolderPlan, staging: Staging, written: Mapping[str, Written]
) -> dict[str, tuple[int, str]]:
    """Add the small files, then hash what has not been yet, as it is on the disk."""
    names: list[str] = []
    known: dict[str, str] = {}
    for artifact in folder.artifacts:
        for name, content in artifact.documents.items():
            write_durably(staging.files / name, content)
        for name, path in artifact.copies.items():
            copy_durably(path, staging.files / name)
        known |= written[artifact.label].digests
        names += artifact.names(written[artifact.label].made.names)
    rest = hash_all(staging.files, [name for name in dict.fromkeys(names) if name not in known], plan.threads)
    return rest | {name: ((staging.files / name).stat().st_size, digest) for name, digest in known.items()}
