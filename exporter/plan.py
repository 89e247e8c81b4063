"""The whole plan as data, and the refusals: everything that can be known before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.adapter import Adapter
from exporter.backends.base import Backend, OutputPlan, SharingBackend
from exporter.backends.registry import load_backend
from exporter.calibration import CalibrationWindows, TokenSets, check_drawable, make_token_sets, most_windows
from exporter.checkpoint import Checkpoint
from exporter.errors import (
    OutputExistsError,
    RecipeError,
)
from exporter.estimate import PlannedWalk, merge_memory, seconds
from exporter.model import MergedModel, plan_merge
from exporter.positions import check_windows
from exporter.recipe import Execution, Inputs, Output, Recipe
from exporter.room import check_disk, check_memory, check_paths, states_budget
from exporter.runtimes.base import check_endpoint, choose_runtime
from exporter.sources import Source, resolve_adapter, resolve_base
from exporter.stopping import stop_tokens
from exporter.verify.limits import check_types
from exporter.verify.pack import PackPlan


@dataclass(frozen=True)
class FolderPlan:
    """One output folder and the artifacts in it.

    Attributes:
        out: the folder that publishing creates.
        backend: the backend that writes it.
        artifacts: one for each quantization type.
        options: the backend's options, as they were asked for.
        runtimes: what will score each artifact, by its label, which is its own in this folder only; empty without
            verification.
    """

    out: Path
    backend: Backend
    artifacts: tuple[OutputPlan, ...]
    options: Mapping[str, Any]
    runtimes: Mapping[str, str] = field(default_factory=dict)

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
        walk: what the walk takes, if anything needs activations.
        seconds: rough duration on this machine.
        pack: the reference pack that is kept, or None.
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
    walk: PlannedWalk
    seconds: float
    pack: PackPlan | None = None

    @property
    def artifacts(self) -> tuple[OutputPlan, ...]:
        """All artifacts of all folders."""
        return tuple(artifact for folder in self.folders for artifact in folder.artifacts)

    @property
    def walks(self) -> bool:
        """Whether something needs activations, so that the tour walks through the layers."""
        return self.walk.walks

    @property
    def walk_bytes(self) -> int:
        """Estimated peak memory of the walk, 0 if nothing needs activations."""
        return self.walk.memory

    @property
    def scratch_bytes(self) -> int:
        """Disk that the walk takes for a while, in the staging folder of the first output."""
        return self.walk.scratch_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files that will be written, those that are removed again too."""
        kept = self.pack.nbytes if self.pack else 0
        return sum(folder.nbytes + folder.temporary_bytes for folder in self.folders) + self.scratch_bytes + kept

    @property
    def input_bytes(self) -> int:
        """Bytes of the base's tensors."""
        return self.model.base.nbytes


def make_plan(recipe: Recipe, execution: Execution) -> ExportPlan:
    """Resolve the inputs, check everything that can be checked, and describe the run. Writes nothing.

    Raises:
        RefusalError: see `exporter.errors`; the first thing that is wrong.
    """
    kept = _pack_folder(recipe)
    outs = [output.out for output in recipe.outputs] + ([kept] if kept else [])
    base_source, adapter_sources, model = open_model(recipe, outs)
    folders = _with_runtimes(
        recipe, execution, [_plan_folder(output, model, verified=recipe.verify) for output in recipe.outputs]
    )
    threads = execution.workers
    artifacts = [artifact for folder in folders for artifact in folder.artifacts]
    chosen = [runtime for folder in folders for runtime in folder.runtimes.values()]
    servers = 0 if execution.endpoint is not None else chosen.count("vllm")
    calibrate = any(artifact.needs != "nothing" for artifact in artifacts)
    check_windows(
        model.config,
        evaluation=recipe.evaluation.n_ctx if recipe.verify else None,
        calibration=recipe.calibration.window if calibrate else None,
    )
    tokens = make_token_sets(
        recipe.calibration, recipe.evaluation, model.tokenizer, evaluate=recipe.verify, calibrate=calibrate
    )
    if tokens.calibration:
        _check_calibration(artifacts, tokens.calibration)
    if tokens.evaluation:
        cut = recipe.evaluation if tokens.calibration else None
        check_drawable(recipe.calibration, recipe.evaluation, model.tokenizer, tokens.evaluation, cut=cut)
    pack = None
    if kept and tokens.evaluation:
        most = most_windows(recipe.evaluation, tokens.evaluation)
        first = len(tokens.evaluation.ids)
        pack = PackPlan.of(recipe, kept, base_source, adapter_sources, model, tokens.evaluation, most, first)
    held, prompts = (pack.held_bytes, pack.prompt_lengths) if pack else (0, ())
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
        walk=PlannedWalk(model, artifacts, tokens, recipe.compute_dtype, states_budget(), held, prompts),
        seconds=seconds(model, artifacts, threads, tokens, servers=servers, answers=recipe.evaluation.answers),
        pack=pack,
    )
    _check_resources(plan)
    return plan


def open_model(recipe: Inputs, outs: Sequence[Path]) -> tuple[Source, tuple[Source, ...], MergedModel]:
    """Resolve and open base and adapters, and check the folders that will be written.

    Returns:
        The base's source, the adapters' sources, and the merged model.

    Raises:
        RefusalError: see `exporter.errors`.
    """
    base_source = resolve_base(recipe.base)
    adapter_sources = tuple(resolve_adapter(source) for source in recipe.adapters)
    check_paths(recipe, outs, (base_source, *adapter_sources))
    base = Checkpoint.open(base_source.folder)
    adapters = tuple(Adapter.open(source.folder) for source in adapter_sources)
    name = recipe.name or "-".join(source.name for source in (base_source, *adapter_sources))
    return base_source, adapter_sources, plan_merge(base, adapters, name)


def _pack_folder(recipe: Recipe) -> Path | None:
    """Where the reference pack is kept, if it is: beside the first output.

    Raises:
        RecipeError: it cannot be, since nothing is scored; or its dtype is given and no pack is kept.
    """
    if not recipe.keep_reference:
        if recipe.reference_dtype:
            raise RecipeError(
                "--reference-dtype", found="no reference that is kept", expected="--keep-reference beside it",
                remedy="Add --keep-reference, or leave it out.",
            )  # fmt: skip
        return None
    if not recipe.verify:
        raise RecipeError(
            "--keep-reference", found="--no-verify beside it, without which there is no reference",
            expected="one of the two", remedy="Leave one out, or make the pack with `exporter reference`.",
        )  # fmt: skip
    first = recipe.outputs[0].out
    return first.parent / f"{first.name}.reference"


def _plan_folder(output: Output, model: MergedModel, *, verified: bool) -> FolderPlan:
    backend = load_backend(output.format)
    quants = output.quant or (backend.default_quant(model),)
    planned = tuple(backend.plan(model, quant, output.options, verified=verified) for quant in quants)
    planned = backend.share(planned) if isinstance(backend, SharingBackend) else planned
    ends = stop_tokens(model).notes
    artifacts = tuple(replace(artifact, notes=(*artifact.notes, *ends)) if ends else artifact for artifact in planned)
    # Of model folders, which are their own entry, one to an output, however their shards are named.
    entries = Counter(
        name for one in artifacts for name in dict.fromkeys((one.entry, *(file.name for file in one.files)))
    )
    clash = next((name for name, count in entries.items() if count > 1), None)
    if clash:
        raise OutputExistsError(
            str(output.out / clash),
            found=f"{len(quants)} types that are written to the same file",
            expected="one type a folder for this format",
            remedy="Give each type an output of its own in a recipe.",
        )
    return FolderPlan(output.out, backend, artifacts, output.options)


def _with_runtimes(recipe: Recipe, execution: Execution, folders: Sequence[FolderPlan]) -> tuple[FolderPlan, ...]:
    """The folders with the runtimes that will score their artifacts.

    Something must be able to score each artifact, and each limit must be one of an artifact that is made.
    """
    if not recipe.verify:
        return tuple(folders)
    artifacts = [artifact for folder in folders for artifact in folder.artifacts]
    for artifact in artifacts:
        if not artifact.runtimes:
            raise RecipeError(
                artifact.label, found="no runtime that can score it", expected="one", remedy="Export with --no-verify."
            )
    check_types(recipe.evaluation.gate, [artifact.quant for artifact in artifacts])
    chosen = [{artifact.label: _scored_by(artifact, execution) for artifact in folder.artifacts} for folder in folders]
    check_endpoint(execution.endpoint, [runtime for runtimes in chosen for runtime in runtimes.values()])
    return tuple(replace(folder, runtimes=runtimes) for folder, runtimes in zip(folders, chosen, strict=True))


def _scored_by(artifact: OutputPlan, execution: Execution) -> str:
    """The runtime that will score an artifact.

    Raises:
        RecipeError: none can be had here.
    """
    try:
        return choose_runtime(
            artifact.runtimes,
            endpoint=execution.endpoint,
            wanted=execution.runtime,
            packed_bits=artifact.packed_bits,
            packed_experts=artifact.packed_experts,
        )
    except RecipeError as error:
        if execution.runtime is not None:
            raise
        raise RecipeError(
            error.thing,
            found=error.found,
            expected=error.expected,
            remedy=f"{error.remedy} Or export {artifact.label} with --no-verify.",
        ) from None


def _check_calibration(artifacts: Sequence[OutputPlan], calibration: CalibrationWindows) -> None:
    """What is calibrated on too few tokens is not calibrated at all."""
    for artifact in artifacts:
        if calibration.tokens < artifact.fewest_tokens:
            raise RecipeError(
                "--calibration-tokens", found=f"{calibration.tokens} tokens: {artifact.label} would only round",
                expected=f"at least {artifact.fewest_tokens}", remedy="Raise it: 16384 and more are usual.",
            )  # fmt: skip


def _check_resources(plan: ExportPlan) -> None:
    """Disk for every folder that is written, and memory for the walk."""
    written = [(folder.out, folder.nbytes + folder.temporary_bytes) for folder in plan.folders]
    written[0] = (written[0][0], written[0][1] + plan.scratch_bytes)
    if plan.pack is not None:
        written.append((plan.pack.out, plan.pack.nbytes))
    check_disk(written)
    check_memory(plan.walk_bytes, plan.walk.lighter)
