"""plan → tour → stage → verify → publish, in one screen: `export` is the whole flow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exporter.artifact.manifest import MANIFEST_NAME, build_manifest, dump, input_files
from exporter.artifact.staging import Staging, copy_durably, write_durably
from exporter.backends.base import HashingWriter
from exporter.calibration import make_token_sets
from exporter.errors import RefusalError
from exporter.hashing import InputHasher, hash_all
from exporter.plan import ExportPlan, FolderPlan, make_plan
from exporter.recipe import Execution, Recipe
from exporter.reporter import Reporter
from exporter.verify.check import verify_artifacts
from exporter.verify.gate import Verification


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
    """

    plan: ExportPlan
    folders: tuple[FolderResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every folder was published."""
        return all(folder.published for folder in self.folders)


def export(recipe: Recipe, execution: Execution | None = None, reporter: Reporter | None = None) -> ExportResult:
    """Merge, write, verify and publish.

    A failed gate is a result, not an exception: look at `passed`.

    Args:
        recipe: what to export.
        execution: how to run; by default on the best device, on all cores.
        reporter: told what happens; by default nothing is printed.

    Raises:
        RefusalError: arguments or inputs are wrong; nothing is left written.
        ExporterError: something failed on the way; the staging folder is kept, and the same call goes on from it.
    """
    execution, reporter = execution or Execution(), reporter or Reporter()
    plan = make_plan(recipe, execution)
    reporter.planned(plan)
    tokens = make_token_sets(
        recipe.calibration, recipe.evaluation, plan.model.tokenizer, evaluate=recipe.verify, calibrate=False
    )
    windows = tokens.evaluation
    with ExitStack() as stack:
        stagings: list[Staging] = []
        try:
            for folder in plan.folders:
                stagings.append(_open_staging(plan, folder, stack))
        except RefusalError:
            # Another run is at one of them: what an earlier run of this plan left stays, what is new goes.
            for staging in stagings:
                if not staging.resumed:
                    staging.discard()
            raise
        try:
            inputs, digests, device = _tour(plan, stagings, reporter)
        except RefusalError:
            # The inputs turned out to be wrong on the way (a NaN in the base, say): leave nothing behind.
            for staging in stagings:
                staging.discard()
            raise
        outputs = [
            _finish_files(plan, folder, staging, known)
            for folder, staging, known in zip(plan.folders, stagings, digests, strict=True)
        ]
        staged = [(folder, staging.files) for folder, staging in zip(plan.folders, stagings, strict=True)]
        verdicts = verify_artifacts(plan, staged, windows, device, reporter) if windows else [{} for _ in staged]
        results = []
        for folder, staging, files, verdict in zip(plan.folders, stagings, outputs, verdicts, strict=True):
            manifest = build_manifest(plan, folder, inputs, files, tokens, verdict, device.partition(":")[0])
            write_durably(staging.files / MANIFEST_NAME, dump(manifest))
            published = all(verification.passed for verification in verdict.values())
            path = staging.publish() if published else staging.reject()
            results.append(FolderResult(path, published, manifest, verdict))
    result = ExportResult(plan, tuple(results))
    reporter.finished(result)
    return result


def _open_staging(plan: ExportPlan, folder: FolderPlan, stack: ExitStack) -> Staging:
    staging = Staging(folder.out, _key(plan, folder), force=plan.recipe.force)
    stack.callback(staging.close)
    return staging


def _key(plan: ExportPlan, folder: FolderPlan) -> str:
    """Identifies what a staging folder is for: inputs (by size and time), plan, versions and kind of device."""
    inputs = [
        (role, path.name, path.stat().st_size, path.stat().st_mtime_ns) for role, path in sorted(input_files(plan))
    ]
    artifacts = [
        (artifact.label, [(file.name, file.nbytes, hashlib.sha256(file.header).hexdigest()) for file in artifact.files])
        for artifact in folder.artifacts
    ]
    versions = {package: version(package) for package in ("exporter", "torch", "llama-cpp-python")}
    text = json.dumps([inputs, artifacts, versions, plan.execution.device.partition(":")[0]])
    return hashlib.sha256(text.encode()).hexdigest()


def _tour(
    plan: ExportPlan, stagings: Sequence[Staging], reporter: Reporter
) -> tuple[dict[Path, str], list[dict[str, str]], str]:
    """Merge and write every tensor.

    Returns:
        The hash of every input file; for each folder the hashes of the files whose writer took them; the device.
    """
    with ExitStack() as stack:
        hasher = InputHasher()
        stack.callback(hasher.close)
        # The first shard is hashed while torch is imported, which keeps one core busy for seconds.
        hasher.reach(plan.model.tensors[0].source.file)
        from exporter.checkpoint import TensorReader
        from exporter.merge import make_merger, resolve_device
        from exporter.tour.stream import Progress, Rider, Stream

        device = resolve_device(plan.execution.device)
        riders: list[Rider] = []
        for folder, staging in zip(plan.folders, stagings, strict=True):
            for artifact in folder.artifacts:
                writer = folder.backend.open(artifact, staging.files, resume=staging.resumed)
                stack.callback(writer.close)
                sources = {tensor.source: tensor for tensor in artifact.tensors}
                riders.append(Rider(artifact.label, sources, writer, staging))
        merger = make_merger(device, stack.enter_context(TensorReader()))
        reporter.touring(plan, device, resumed=any(staging.resumed for staging in stagings))
        stream = Stream(
            plan.model,
            riders,
            merger,
            threads=plan.threads,
            block_bytes=plan.execution.block_bytes,
            progress=Progress(read=reporter.read, reached=hasher.reach),
        )
        stack.callback(stream.close)
        stream.offer(plan.model.tensors)
        stream.finish()
        digests: list[dict[str, str]] = [{} for _ in stagings]
        for rider in riders:
            if isinstance(rider.writer, HashingWriter):
                digests[stagings.index(rider.staging)] |= rider.writer.digests()
        reporter.toured()
        return hasher.finish(path for _, path in input_files(plan)), digests, device


def _finish_files(
    plan: ExportPlan, folder: FolderPlan, staging: Staging, known: Mapping[str, str]
) -> dict[str, tuple[int, str]]:
    """Add the small files, then hash what has not been yet, as it is on the disk."""
    names: list[str] = []
    for artifact in folder.artifacts:
        for name, content in artifact.documents.items():
            write_durably(staging.files / name, content)
        for name, path in artifact.copies.items():
            copy_durably(path, staging.files / name)
        names += [file.name for file in artifact.files] + list(artifact.documents) + list(artifact.copies)
    rest = hash_all(staging.files, [name for name in dict.fromkeys(names) if name not in known], plan.threads)
    return rest | {name: ((staging.files / name).stat().st_size, digest) for name, digest in known.items()}
