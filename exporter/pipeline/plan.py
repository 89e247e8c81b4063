"""Makes the plan: resolves the inputs, and checks everything that can be checked before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exporter.backends.output_plan import OutputPlan
from exporter.backends.registry import load_backend
from exporter.errors import OutputExistsError, RecipeError
from exporter.merge.model import MergedModel
from exporter.plan.estimate import PlannedWalk, merge_memory, seconds
from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.plan.gate_limits import check_types
from exporter.plan.open_model import open_model
from exporter.plan.reference_pack import PackPlan
from exporter.plan.resources import check_disk, check_memory, states_budget
from exporter.recipe import Execution, Output, Recipe
from exporter.runtimes.registry import check_endpoint, choose_runtime, runtimes_for, startup_seconds
from exporter.tokens.end_tokens import stop_tokens
from exporter.tokens.positions import check_windows
from exporter.tokens.windows import CalibrationWindows, check_drawable, make_token_sets, most_windows


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
    startup = startup_seconds(chosen, execution.endpoint)
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
        seconds=seconds(model, artifacts, threads, tokens, startup=startup, answers=recipe.evaluation.answers),
        pack=pack,
    )
    _check_resources(plan)
    return plan


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
    planned = backend.share(tuple(backend.plan(model, quant, output.options, verified=verified) for quant in quants))
    ends = stop_tokens(model).notes
    artifacts = tuple(
        replace(one, notes=(*one.notes, *ends), runtimes=runtimes_for(one.facts, one.runtimes)) for one in planned
    )
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
            packed=artifact.packed,
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
