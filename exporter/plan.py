"""The whole plan as data, and the refusals: everything that can be known before a byte is written."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from exporter.adapter import Adapter
from exporter.backends.base import Backend, OutputPlan
from exporter.backends.registry import load_backend
from exporter.calibration import TokenSets, make_token_sets
from exporter.checkpoint import Checkpoint
from exporter.errors import (
    MissingFileError,
    NotEnoughDiskError,
    NotEnoughMemoryError,
    OutputExistsError,
    OverlappingPathsError,
    RecipeError,
)
from exporter.estimate import merge_memory, scratch_bytes, seconds, tour_memory
from exporter.model import MergedModel, plan_merge
from exporter.recipe import Execution, Output, Recipe
from exporter.runtimes.base import check_endpoint, choose_runtime
from exporter.sources import Source, resolve_adapter, resolve_base
from exporter.stopping import stop_tokens

# export.json and the like, beside the planned files.
_SLACK_BYTES = 8 << 20


@dataclass(frozen=True)
class FolderPlan:
    """One output folder and the artifacts in it.

    Attributes:
        out: the folder that publishing creates.
        backend: the backend that writes it.
        artifacts: one for each quantization type.
    """

    out: Path
    backend: Backend
    artifacts: tuple[OutputPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(artifact.nbytes for artifact in self.artifacts)

    @property
    def temporary_bytes(self) -> int:
        """Bytes that are needed beside its files while they are made."""
        return sum(artifact.temporary_bytes for artifact in self.artifacts)


@dataclass(frozen=True)
class ExportPlan:
    """What a run will read, write, need and check.

    Attributes:
        recipe: what was asked for.
        execution: how it will run.
        base: the base's source.
        adapters: the adapters' sources.
        model: the merged model.
        folders: the output folders.
        threads: worker threads.
        tokens: evaluation and calibration windows.
        merge_bytes: estimated peak memory of merging and writing.
        walk_bytes: estimated peak memory of the walk, 0 if nothing needs activations.
        scratch_bytes: disk that the walk takes for a while, in the staging folder of the first output.
        seconds: rough duration on this machine.
        runtimes: what will score each artifact, by its label; empty without verification.
    """

    recipe: Recipe
    execution: Execution
    base: Source
    adapters: tuple[Source, ...]
    model: MergedModel
    folders: tuple[FolderPlan, ...]
    threads: int
    tokens: TokenSets
    merge_bytes: int
    walk_bytes: int
    scratch_bytes: int
    seconds: float
    runtimes: Mapping[str, str]

    @property
    def artifacts(self) -> tuple[OutputPlan, ...]:
        """All artifacts of all folders."""
        return tuple(artifact for folder in self.folders for artifact in folder.artifacts)

    @property
    def walks(self) -> bool:
        """Whether something needs activations, so that the tour walks through the layers."""
        return self.walk_bytes > 0

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files that will be written, those that are removed again too."""
        return sum(folder.nbytes + folder.temporary_bytes for folder in self.folders) + self.scratch_bytes

    @property
    def input_bytes(self) -> int:
        """Bytes of the base's tensors."""
        return self.model.base.nbytes


def make_plan(recipe: Recipe, execution: Execution) -> ExportPlan:
    """Resolve the inputs, check everything that can be checked, and describe the run. Writes nothing.

    Raises:
        RefusalError: see `exporter.errors`; the first thing that is wrong.
    """
    base_source = resolve_base(recipe.base)
    adapter_sources = tuple(resolve_adapter(source) for source in recipe.adapters)
    _check_paths(recipe, (base_source, *adapter_sources))
    base = Checkpoint.open(base_source.folder)
    adapters = tuple(Adapter.open(source.folder) for source in adapter_sources)
    name = recipe.name or "-".join(source.name for source in (base_source, *adapter_sources))
    model = plan_merge(base, adapters, name)
    folders = tuple(_plan_folder(output, model, verified=recipe.verify) for output in recipe.outputs)
    threads = execution.workers
    artifacts = [artifact for folder in folders for artifact in folder.artifacts]
    runtimes = _check_verification(recipe, execution, artifacts)
    servers = sum(runtimes.get(artifact.label) == "vllm" and execution.endpoint is None for artifact in artifacts)
    tokens = make_token_sets(
        recipe.calibration,
        recipe.evaluation,
        model.tokenizer,
        evaluate=recipe.verify,
        calibrate=any(artifact.needs != "nothing" for artifact in artifacts),
    )
    walks = tokens.evaluation is not None or any(artifact.needs in ("moments", "hessians") for artifact in artifacts)
    plan = ExportPlan(
        recipe=recipe,
        execution=execution,
        base=base_source,
        adapters=adapter_sources,
        model=model,
        folders=folders,
        threads=threads,
        tokens=tokens,
        merge_bytes=merge_memory(model, threads, execution.block_bytes),
        walk_bytes=tour_memory(model, artifacts, tokens, recipe.compute_dtype) if walks else 0,
        scratch_bytes=scratch_bytes(model, artifacts, tokens, recipe.compute_dtype) if walks else 0,
        seconds=seconds(model, artifacts, threads, tokens, servers),
        runtimes=runtimes,
    )
    _check_resources(plan)
    return plan


def _plan_folder(output: Output, model: MergedModel, *, verified: bool) -> FolderPlan:
    backend = load_backend(output.format)
    quants = output.quant or (backend.default_quant(model),)
    planned = [backend.plan(model, quant, output.options, verified=verified) for quant in quants]
    ends = stop_tokens(model).notes
    artifacts = tuple(replace(artifact, notes=(*artifact.notes, *ends)) if ends else artifact for artifact in planned)
    entries = Counter(file.name for artifact in artifacts for file in artifact.files)
    clash = next((name for name, count in entries.items() if count > 1), None)
    if clash:
        raise OutputExistsError(
            str(output.out / clash),
            found=f"{len(quants)} types that are written to the same file",
            expected="one type a folder for this format",
            remedy="Give each type an output of its own in a recipe.",
        )
    return FolderPlan(output.out, backend, artifacts)


def _check_paths(recipe: Recipe, sources: tuple[Source, ...]) -> None:
    """Outputs must not exist, must have a parent that can be made, and must be apart from the inputs."""
    text = recipe.calibration.file
    if text is not None and not text.is_file():
        raise MissingFileError(
            str(text), found="no such file", expected="a .txt or .jsonl file", remedy="Check --calibration."
        )
    inputs = [(source.name, source.folder.resolve()) for source in sources]
    if text is not None:
        inputs.append((text.name, text.resolve()))
    others = [output.out.resolve() for output in recipe.outputs]
    for output in recipe.outputs:
        out = output.out.absolute()
        if output.out.name in ("", ".."):
            raise RecipeError(
                "--out", found=repr(str(output.out)), expected="a folder with a name", remedy="Choose another --out."
            )
        if not all(above.is_dir() for above in out.parents if above.exists()):
            raise OverlappingPathsError(
                str(output.out),
                found="a file on the way",
                expected="folders down to it",
                remedy="Choose another --out.",
            )
        if os.path.lexists(out) and not recipe.force:
            raise OutputExistsError(
                str(output.out),
                found="a file or folder",
                expected="nothing there",
                remedy="Choose another --out, or use --force to replace it.",
            )
        # A failed gate replaces OUT.rejected, and a run works in .OUT.staging.
        inside = out.resolve()
        for place in (inside, inside.with_name(f"{inside.name}.rejected"), inside.with_name(f".{inside.name}.staging")):
            apart = inputs + [("of another output", other) for other in others if place != inside or other != inside]
            for name, path in apart:
                if place == path or path in place.parents or place in path.parents:
                    raise OverlappingPathsError(
                        str(output.out),
                        found=f"an output that overlaps {name}",
                        expected="files and folders apart from each other",
                        remedy="Choose another --out.",
                    )


def _check_verification(recipe: Recipe, execution: Execution, artifacts: list[OutputPlan]) -> dict[str, str]:
    """Something must be able to score each artifact, and each limit must be one of an artifact that is made.

    Returns:
        The runtime that will score each artifact, by label.
    """
    if not recipe.verify:
        return {}
    for artifact in artifacts:
        if not artifact.runtimes:
            raise RecipeError(
                artifact.label, found="no runtime that can score it", expected="one", remedy="Export with --no-verify."
            )
    made = {artifact.quant.lower() for artifact in artifacts}
    if unknown := [key for key in recipe.evaluation.gate if key != "*" and key.lower() not in made]:
        raise RecipeError(
            f"evaluation.gate.{unknown[0]}",
            found="a limit of a type that is not made",
            expected="* or one of " + " ".join(dict.fromkeys(artifact.quant for artifact in artifacts)),
            remedy="Correct the name of the type.",
        )
    chosen = {
        artifact.label: choose_runtime(
            artifact.runtimes,
            endpoint=execution.endpoint,
            wanted=execution.runtime,
            packed_bits=artifact.packed_bits,
        )
        for artifact in artifacts
    }
    check_endpoint(execution.endpoint, list(chosen.values()))
    return chosen


def _check_resources(plan: ExportPlan) -> None:
    """Disk for each file system that is written to, and memory for the reference."""
    needed: Counter[int] = Counter()
    free: dict[int, tuple[Path, int]] = {}
    for folder in plan.folders:
        parent = _existing_parent(folder.out)
        device = parent.stat().st_dev
        scratch = plan.scratch_bytes if folder is plan.folders[0] else 0
        needed[device] += folder.nbytes + folder.temporary_bytes + scratch + _SLACK_BYTES - staged_bytes(folder.out)
        free[device] = (parent, shutil.disk_usage(parent).free)
    for device, nbytes in needed.items():
        parent, available = free[device]
        if nbytes > available:
            raise NotEnoughDiskError(
                str(parent),
                found=f"{available / 1e9:.2f} GB free",
                expected=f"{nbytes / 1e9:.2f} GB for the planned files",
                remedy="Free some disk, or choose another --out.",
            )
    memory = psutil.virtual_memory().available
    if plan.walk_bytes > memory:
        raise NotEnoughMemoryError(
            "the walk through the layers",
            found=f"{memory / 1e9:.1f} GB of memory available",
            expected=f"{plan.walk_bytes / 1e9:.1f} GB",
            remedy="Run on a machine with more memory, with fewer tokens, with --compute-dtype bfloat16, or with "
            "--no-verify.",
        )


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    return parent


def staged_bytes(out: Path) -> int:
    """Bytes that an earlier run left in the staging folder of an output."""
    staging = out.parent / f".{out.name}.staging"
    return sum(file.stat().st_blocks * 512 for file in staging.rglob("*") if file.is_file()) if staging.is_dir() else 0


def describe(plan: ExportPlan) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "base": {"name": plan.base.name, "revision": plan.base.revision, "bytes": plan.input_bytes},
        "adapters": [
            {"name": source.name, "revision": source.revision, "targets": len(adapter.updates)}
            for source, adapter in zip(plan.adapters, plan.model.adapters, strict=True)
        ],
        "model": {
            "name": plan.model.name,
            "architecture": (plan.model.config.get("architectures") or [None])[0],
            "parameters": plan.model.parameters,
            "tensors": len(plan.model.tensors),
            "tensors_updated": plan.model.updated,
            "untied": plan.model.untied,
        },
        "outputs": [_describe_folder(folder, plan) for folder in plan.folders],
        "tokens": _describe_tokens(plan.tokens),
        "disk_bytes": plan.disk_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "memory_bytes": {"merge": plan.merge_bytes, "walk": plan.walk_bytes},
        "seconds": round(plan.seconds, 1),
        "threads": plan.threads,
        "device": plan.execution.device,
    }


def _describe_tokens(tokens: TokenSets) -> dict[str, Any]:
    evaluation, calibration = tokens.evaluation, tokens.calibration
    return {
        "evaluation": {"source": evaluation.source, "windows": len(evaluation.ids), "n_ctx": evaluation.n_ctx}
        if evaluation
        else None,
        "calibration": {
            "source": calibration.source,
            "windows": len(calibration.ids),
            "window": calibration.window,
            "seed": calibration.seed,
        }
        if calibration
        else None,
    }


def _describe_folder(folder: FolderPlan, plan: ExportPlan) -> dict[str, Any]:
    return {
        "out": str(folder.out),
        "artifacts": [
            {
                "format": artifact.format,
                "quant": artifact.quant,
                "entry": artifact.entry,
                "bytes": artifact.nbytes,
                "files": [{"name": file.name, "bytes": file.nbytes} for file in artifact.files]
                + [{"name": name, "bytes": len(content)} for name, content in artifact.documents.items()]
                + [{"name": name, "bytes": path.stat().st_size} for name, path in artifact.copies.items()]
                + [{"name": name, "bytes": nbytes} for name, nbytes in artifact.made.items()],
                "types": type_shares(artifact),
                "fallbacks": [
                    {"tensor": tensor.name, "wanted": tensor.fallback_from, "type": tensor.type}
                    for tensor in artifact.fallbacks
                ],
                "notes": list(artifact.notes),
                "verified_by": plan.runtimes.get(artifact.label),
            }
            for artifact in folder.artifacts
        ],
    }


def type_shares(artifact: OutputPlan) -> dict[str, dict[str, float]]:
    """Tensors, bytes and share of the bytes by type, the largest first."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in artifact.tensors:
        tensors[tensor.type] += 1
        nbytes[tensor.type] += tensor.nbytes
    total = sum(nbytes.values()) or 1
    return {
        kind: {"tensors": tensors[kind], "bytes": size, "share": round(size / total, 4)}
        for kind, size in nbytes.most_common()
    }
