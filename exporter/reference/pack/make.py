"""The reference by itself: plan → walk → write → publish, for a pack that artifacts are judged with elsewhere."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, closing
from importlib.metadata import version
from typing import Any

from exporter.artifact.hashing import InputHasher
from exporter.artifact.input_records import model_files
from exporter.artifact.staging import Staging
from exporter.errors import RefusalError
from exporter.plan.estimate import PlannedWalk
from exporter.plan.open_model import open_model
from exporter.plan.reference_pack import PackPlan
from exporter.plan.reporter import Reporter
from exporter.plan.resources import check_device_memory, check_disk, check_memory, memory_errors, states_budget
from exporter.recipe import Evaluation, Execution, ReferenceRecipe
from exporter.reference.predictions import walk_reference
from exporter.tokens.positions import check_windows
from exporter.tokens.windows import check_decidable, evaluation_tokens, make_windows


@memory_errors()
def make_reference(
    recipe: ReferenceRecipe, execution: Execution | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Walk through the trained model and write a reference pack.

    Args:
        recipe: what to score, and where the pack goes.
        execution: how to run; by default on the best device, on all cores.
        reporter: told about every layer and window; by default nothing is printed.

    Returns:
        The pack's description, as in its `reference.json`.

    Raises:
        RefusalError: arguments or inputs are wrong; nothing is left written.
        OutOfMemoryError: memory ran out on the way, against the estimate; the staging folder is kept.
        ExporterError: something else failed on the way; likewise, and the same call goes on from it.
    """
    execution, reporter = execution or Execution(), reporter or Reporter()
    keep_bytes = states_budget()
    plan = plan_reference(recipe, keep_bytes)
    with ExitStack() as stack:
        from exporter.merge.device import resolve_device
        from exporter.reference.pack.writer import STAGING_KEY, write_pack

        device = resolve_device(execution.device)
        walk = _planned_walk(plan, keep_bytes)
        check_device_memory(device, walk.device_memory)
        staging = Staging(recipe.out, STAGING_KEY, force=recipe.force)
        stack.callback(staging.close)
        hasher = stack.enter_context(closing(InputHasher()))
        try:
            reference = walk_reference(
                plan.model,
                plan.windows,
                device,
                reporter,
                threads=execution.workers,
                on_file=hasher.reach,
                compute_dtype=plan.compute_dtype,
                scratch=staging.scratch,
                key=_key(plan, device),
                keep_bytes=keep_bytes,
                prompts=plan.prompts,
            )
            reporter.scoring("reference", plan.windows)
            reference.complete(reporter.window)
            hashes = hasher.finish(path for _, path in model_files(plan.model))
        except RefusalError:
            # The inputs turned out to be wrong on the way (a NaN in the base, say): leave nothing behind.
            staging.discard()
            raise
        reporter.scored()
        description = write_pack(plan, reference, hashes, staging, device, execution.workers)
        staging.publish()
    return description


def plan_reference(recipe: ReferenceRecipe, keep_bytes: int) -> PackPlan:
    """Resolve the inputs and check everything that can be checked. Writes nothing.

    Args:
        recipe: what to score, and where the pack goes.
        keep_bytes: hidden states that stay in memory.

    Raises:
        RefusalError: see `exporter.errors`; the first thing that is wrong.
    """
    base, adapters, model = open_model(recipe, [recipe.out])
    check_windows(model.config, evaluation=recipe.evaluation.n_ctx, calibration=None)
    windows = make_windows(recipe.calibration, _all_of(recipe.evaluation), model.tokenizer)
    check_decidable(windows)
    most = len(windows.ids)
    first = min(most, evaluation_tokens(recipe.evaluation) // windows.n_ctx)
    plan = PackPlan.of(recipe, recipe.out, base, adapters, model, windows, most, first)
    walk = _planned_walk(plan, keep_bytes)
    check_disk([(recipe.out, plan.nbytes + walk.scratch_bytes)])
    check_memory(walk.memory, walk.lighter)
    return plan


def _all_of(evaluation: Evaluation) -> Evaluation:
    """With all tokens that may be scored for those that are scored first. Where nothing is said of further ones there
    are none: unlike an export, the walk takes them whether a verdict needs them or not."""
    if "max_tokens" not in evaluation.model_fields_set:
        return evaluation
    return evaluation.model_copy(update={"tokens": max(evaluation.tokens, evaluation.max_tokens)})


def _planned_walk(plan: PackPlan, keep_bytes: int) -> PlannedWalk:
    return PlannedWalk.for_reference(plan.model, plan.windows, plan.compute_dtype, keep_bytes, plan.prompt_lengths)


def _key(plan: PackPlan, device: str) -> str:
    """Identifies what a walk is for: inputs (by size and time), windows, prompts, versions and kind of device."""
    inputs = [(role, path.name, path.stat().st_size, path.stat().st_mtime_ns) for role, path in model_files(plan.model)]
    versions = {package: version(package) for package in ("exporter", "torch")}
    prompts = [prompt.ids for prompt in plan.prompts]
    text = json.dumps([inputs, plan.windows.sha256, prompts, plan.compute_dtype, device.partition(":")[0], versions])
    return hashlib.sha256(text.encode()).hexdigest()
