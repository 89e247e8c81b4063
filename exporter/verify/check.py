"""Scores staged artifacts against the reference, each in its own runtime, and judges them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exporter.calibration import Windows
from exporter.errors import RuntimeScoreError
from exporter.plan import ExportPlan, FolderPlan
from exporter.reporter import Reporter
from exporter.runtimes.base import load_runtime
from exporter.verify.gate import Verification, gate_for, judge
from exporter.verify.metrics import compare


def verify_artifacts(
    plan: ExportPlan,
    staged: Sequence[tuple[FolderPlan, Path]],
    windows: Windows,
    device: str,
    reporter: Reporter,
) -> list[dict[str, Verification]]:
    """Score the reference once, then every artifact, and judge each.

    Args:
        plan: the run's plan.
        staged: every output folder with the place where its files are now.
        windows: what to score.
        device: where transformers computes.
        reporter: told about every window and verdict.

    Returns:
        For each output folder, the verification of each artifact by label.

    Raises:
        RuntimeScoreError: a runtime cannot load or run the reference or an artifact.
    """
    # Not at the top: torch, which this needs, is imported while the first shard is hashed.
    from exporter.verify.reference import reference_of

    reference = reference_of(plan.model, windows, device, plan.threads, reporter).scores
    found: list[dict[str, Verification]] = []
    for folder, files in staged:
        verdicts: dict[str, Verification] = {}
        for artifact in folder.artifacts:
            runtime = load_runtime(plan.runtimes[artifact.label], device, plan.execution.endpoint)
            reporter.scoring(f"{artifact.label} in {runtime.name}", windows)
            scores = runtime.score(files if artifact.entry == "." else files / artifact.entry, windows, reporter.window)
            if not np.isfinite(scores.log_probabilities).all():
                raise RuntimeScoreError(
                    f"{artifact.label} in {runtime.name}", found="log-probabilities that are not finite",
                    expected="numbers", remedy="Choose a type with a wider range, such as bf16.",
                )  # fmt: skip
            comparison = compare(scores, reference)
            gate = gate_for(artifact.label, artifact.quant, plan.recipe.evaluation.gate)
            verdicts[artifact.label] = judge(runtime.version(), comparison, gate)
        found.append(verdicts)
    reporter.scored()
    return found
