"""Scores staged artifacts in their runtimes, and judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.plan.gate_limits import gate_for
from exporter.plan.reporter import Reporter
from exporter.reference.further_tokens import DrawnTokens
from exporter.runtimes.registry import load_runtime
from exporter.tokens.windows import Windows
from exporter.verify.answers.run import Served, WalkedModel, answers_of
from exporter.verify.candidates import Candidate, judge_candidates, read_all_weights
from exporter.verify.gate import Verification, with_answers

if TYPE_CHECKING:
    from exporter.reference.predictions import Reference


def answer_artifacts(
    plan: ExportPlan,
    staged: Sequence[tuple[FolderPlan, Path]],
    verdicts: Sequence[Mapping[str, Verification]],
    device: str,
    reporter: Reporter,
) -> list[dict[str, Verification]]:
    """The verdicts on a run's artifacts with their answers, and with the faults in those among what is broken.

    Args:
        plan: the run's plan.
        staged: every output folder with the place where its files are now.
        verdicts: for each of them, the verification of each artifact by label.
        device: where transformers and the reference compute.
        reporter: told about every artifact and layer.

    Raises:
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    served = [
        Served(
            artifact.label,
            files if artifact.entry == "." else files / artifact.entry,
            load_runtime(folder.runtimes[artifact.label], device, plan.execution.endpoint),
        )
        if found[artifact.label].comparison
        else None
        for (folder, files), found in zip(staged, verdicts, strict=True)
        for artifact in folder.artifacts
    ]
    trained = WalkedModel(plan.model, device, plan.threads, plan.recipe.compute_dtype)
    answers = iter(answers_of(trained, served, reporter))
    return [
        {artifact.label: with_answers(found[artifact.label], next(answers)) for artifact in folder.artifacts}
        for (folder, _), found in zip(staged, verdicts, strict=True)
    ]


@dataclass(frozen=True)
class Verified:
    """What became of verification in a run.

    Attributes:
        verdicts: for each output folder, the verification of each artifact by label.
        drawn: the windows that were drawn because a verdict was undecided; None if none were.
        reference: the trained model on the first windows, and on those that were drawn if a pack is kept.
    """

    verdicts: list[dict[str, Verification]]
    drawn: Windows | None
    reference: Reference


def verify_artifacts(
    plan: ExportPlan,
    staged: Sequence[tuple[FolderPlan, Path]],
    checksums: Sequence[Mapping[str, Mapping[str, str]]],
    reference: Reference,
    device: str,
    reporter: Reporter,
    scratch: Path | None = None,
) -> Verified:
    """Score every artifact of a run and judge it.

    Args:
        plan: the run's plan.
        staged: every output folder with the place where its files are now.
        checksums: for each of them, by artifact label, what `Candidate` has.
        reference: the trained model.
        device: where transformers computes.
        reporter: told about every window and verdict.
        scratch: as of `DrawnTokens`.

    Raises:
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    candidates = [
        Candidate(
            artifact.label,
            artifact.quant,
            files if artifact.entry == "." else files / artifact.entry,
            load_runtime(folder.runtimes[artifact.label], device, plan.execution.endpoint),
            gate_for(artifact.label, artifact.quant, plan.recipe.evaluation.gate, plan.model.parameters),
            folder.backend,
            checksums=known[artifact.label],
        )
        for (folder, files), known in zip(staged, checksums, strict=True)
        for artifact in folder.artifacts
    ]
    more = DrawnTokens(
        plan.model,
        plan.recipe.calibration,
        plan.recipe.evaluation,
        reference,
        device,
        reporter,
        cut=plan.recipe.evaluation if plan.tokens.calibration else None,
        threads=plan.threads,
        compute_dtype=plan.recipe.compute_dtype,
        keep=plan.pack is not None,
        scratch=scratch,
    )
    weights = read_all_weights(candidates, plan.model, reporter, plan.threads)
    found = iter(judge_candidates(candidates, weights, reference, more, reporter))
    verdicts = [{artifact.label: next(found) for artifact in folder.artifacts} for folder, _ in staged]
    return Verified(verdicts, more.drawn, more.reference())
