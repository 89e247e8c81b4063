"""Scores artifacts against the reference, each in its own runtime, and judges them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.errors import RuntimeScoreError
from exporter.plan import ExportPlan, FolderPlan
from exporter.reporter import Reporter
from exporter.runtimes.base import Runtime, load_runtime
from exporter.verify.gate import Verification, gate_for, judge
from exporter.verify.metrics import Comparison, compare
from exporter.verify.weights import read_weights

if TYPE_CHECKING:
    from exporter.verify.reference import Reference


def verify_artifacts(
    plan: ExportPlan,
    staged: Sequence[tuple[FolderPlan, Path]],
    reference: Reference,
    device: str,
    reporter: Reporter,
) -> list[dict[str, Verification]]:
    """Score every artifact and judge it.

    Args:
        plan: the run's plan.
        staged: every output folder with the place where its files are now.
        reference: the trained model.
        device: where transformers computes.
        reporter: told about every window and verdict.

    Returns:
        For each output folder, the verification of each artifact by label.

    Raises:
        RuntimeScoreError: a runtime cannot load or run an artifact.
    """
    found: list[dict[str, Verification]] = []
    for folder, files in staged:
        verdicts: dict[str, Verification] = {}
        for artifact in folder.artifacts:
            runtime = load_runtime(plan.runtimes[artifact.label], device, plan.execution.endpoint)
            entry = files if artifact.entry == "." else files / artifact.entry
            weights = read_weights(folder.backend, plan.model, artifact.quant, entry, plan.threads)
            comparison = compare_in(runtime, entry, artifact.label, reference, reporter)
            gate = gate_for(artifact.label, artifact.quant, plan.recipe.evaluation.gate)
            verdicts[artifact.label] = judge(runtime.version(), comparison, gate, weights)
        found.append(verdicts)
    reporter.scored()
    return found


def compare_in(runtime: Runtime, entry: Path, label: str, reference: Reference, reporter: Reporter) -> Comparison:
    """Score one artifact in one runtime.

    Args:
        runtime: what serves it.
        entry: what the runtime loads.
        label: the artifact's name, for messages.
        reference: the trained model.
        reporter: told about every window.

    Raises:
        RuntimeScoreError: the runtime cannot load or run it, or its scores are not numbers.
    """
    # Not at the top: torch, which this needs, is imported while the first shard is hashed.
    from exporter.verify.divergence import Divergence

    divergence = Divergence(reference)
    reporter.scoring(f"{label} in {runtime.name}", reference.windows)
    scores = runtime.score(entry, reference.windows, reporter.window, divergence.take)
    found = divergence.found(scores)
    arrays = (scores.log_probabilities, found.kl, found.jensen_shannon, found.top_k)
    if not all(np.isfinite(values).all() for values in arrays if values is not None):
        raise RuntimeScoreError(
            f"{label} in {runtime.name}", found="log-probabilities that are not finite",
            expected="numbers", remedy="Choose a type with a wider range, such as bf16.",
        )  # fmt: skip
    return compare(scores, reference.scores, found)
