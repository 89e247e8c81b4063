"""Finishes the files of each output folder, and publishes or rejects it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.durable import copy_durably, json_document, write_durably
from exporter.artifact.file_records import MANIFEST_NAME
from exporter.artifact.hashing import hash_all
from exporter.artifact.staging import Staging
from exporter.pipeline.job import Job
from exporter.pipeline.result import ExportResult, FolderResult, Verified
from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.publish.manifest import build_manifest, input_files
from exporter.publish.model_card import CARD_NAME, BaseCard, model_card
from exporter.publish.report.html import REPORT_NAME, report_html

if TYPE_CHECKING:
    from exporter.pipeline.tour import Toured
    from exporter.reference.predictions import Reference


def stage_pack(
    plan: ExportPlan, reference: Reference, device: str, inputs: Mapping[Path, str], stack: ExitStack
) -> Staging | None:
    """Write the reference pack that was asked for, so that nothing but a rename is left to do."""
    if plan.pack is None:
        return None
    from exporter.reference.pack.writer import STAGING_KEY, write_pack

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


def finish_files(plan: ExportPlan, job: Job) -> None:
    """Add the small files, then hash what has not been yet, as it is on the disk."""
    names: list[str] = []
    known: dict[str, str] = {}
    folder = job.staging.files
    for artifact in job.plan.artifacts:
        for name, content in artifact.documents.items():
            write_durably(folder / name, content)
        for name, path in artifact.copies.items():
            copy_durably(path, folder / name)
        known |= job.written[artifact.label].digests
        names += artifact.names(job.written[artifact.label].made.names)
    rest = hash_all(folder, [name for name in dict.fromkeys(names) if name not in known], plan.threads)
    job.files = rest | {name: ((folder / name).stat().st_size, digest) for name, digest in known.items()}


def publish(plan: ExportPlan, jobs: Sequence[Job], toured: Toured, verified: Verified) -> ExportResult:
    """Describe every output folder, and rename it to its place: the one asked for, or `OUT.rejected`.

    Args:
        plan: the run's plan.
        jobs: its output folders, finished and judged.
        toured: hashes of the inputs, and where the tour was computed.
        verified: the windows that were drawn, and the reference pack if one is kept.
    """
    results, base_card, kind = [], BaseCard.of(plan), toured.device.partition(":")[0]
    for job in jobs:
        manifest = build_manifest(
            plan, job.plan, toured.inputs, job.files, job.written, job.verdicts, kind, verified.drawn
        )
        write_durably(job.staging.files / CARD_NAME, model_card(manifest, base_card))
        write_durably(job.staging.files / MANIFEST_NAME, json_document(manifest))
        write_durably(job.staging.files / REPORT_NAME, report_html(manifest))
        path = job.staging.publish() if job.passed else job.staging.reject()
        results.append(FolderResult(path, job.passed, manifest, job.verdicts))
    # It is of the trained model, so it is kept whatever became of the outputs.
    kept = verified.pack.publish() if verified.pack else None
    return ExportResult(plan, tuple(results), kept)
