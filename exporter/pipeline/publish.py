"""Finishes the files of each output folder, and publishes or rejects it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.durable import copy_durably, write_durably
from exporter.artifact.hashing import hash_all
from exporter.artifact.staging import Staging
from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.publish.manifest import input_files

if TYPE_CHECKING:
    from exporter.backends.base import WriteResult
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


def finish_files(
    plan: ExportPlan, folder: FolderPlan, staging: Staging, written: Mapping[str, WriteResult]
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
