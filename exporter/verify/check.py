"""Scores artifacts against the reference, each in its own runtime, and judges them.

While the verdict on an artifact is undecided, as many windows again as it was scored on are drawn, until there are as
many as may be. Three looks, which the default numbers of tokens make, about double the chance that a figure exactly at
its limit gets past it: by simulation from 2.5 % to 5.8 % where the means of windows are normal, and from 4.8 % to 9.7 %
where they are log-normal and as unlike as a real model's KL divergences (`scripts/repeated_looks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.backends.base import Backend
from exporter.calibration import Windows
from exporter.errors import RuntimeScoreError
from exporter.model import MergedModel
from exporter.plan import ExportPlan, FolderPlan
from exporter.reporter import Reporter
from exporter.runtimes.base import Runtime, load_runtime
from exporter.verify.gate import Verification, judge, not_scored
from exporter.verify.limits import Gate, gate_for
from exporter.verify.more_tokens import DrawnTokens, MoreTokens
from exporter.verify.scored import Scored, score_in
from exporter.verify.unscored import is_of_the_run, unscored_reason
from exporter.verify.weights import Check, WeightsResult, check_weights, read_weights

if TYPE_CHECKING:
    from exporter.verify.reference import Reference


@dataclass(frozen=True)
class Candidate:
    """An artifact to be judged.

    Attributes:
        label: its name, for messages.
        quant: its type.
        entry: what the runtime loads.
        runtime: what serves it.
        gate: its limits.
        backend: what wrote it and can read its weights back; None if that is not here, or not to be done.
        served: whether it is made for that runtime; of another, it is no fault that it cannot load it.
        checksums: of its tensors as they were encoded, by the merged tensor's name, as far as they are known.
    """

    label: str
    quant: str
    entry: Path
    runtime: Runtime
    gate: Gate
    backend: Backend | None
    served: bool = True
    checksums: Mapping[str, str] = field(default_factory=dict)


def read_all_weights(
    candidates: Sequence[Candidate],
    model: MergedModel,
    reporter: Reporter,
    threads: int,
    check: Check = check_weights,
) -> list[WeightsResult | None]:
    """Read back the weights of every artifact; None of those that nothing here can read.

    Args:
        candidates: the artifacts.
        model: the merged model.
        reporter: told about every artifact.
        threads: threads that compute.
        check: see `read_weights`.
    """
    found: list[WeightsResult | None] = []
    for one in candidates:
        if one.backend is not None:
            reporter.doing(f"weights of {one.label}")
        found.append(read_weights(one.backend, model, one.quant, one.entry, threads, one.checksums, check))
    return found


def judge_candidates(
    candidates: Sequence[Candidate],
    weights: Sequence[WeightsResult | None],
    reference: Reference,
    more: MoreTokens,
    reporter: Reporter,
) -> list[Verification]:
    """Score every artifact and judge it, on more tokens where that is undecided.

    One that its runtime cannot load or run, or whose scores are no numbers, has failed, and the others are scored; see
    `exporter.verify.unscored`.

    Args:
        candidates: the artifacts.
        weights: what was found in the weights of each; None where they were not read.
        reference: the trained model on the first windows.
        more: where further ones come from.
        reporter: told about every window.

    Returns:
        The verdicts, in the order of the candidates.

    Raises:
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    scored: list[Scored | None] = []
    verdicts: list[Verification] = []
    for one, found in zip(candidates, weights, strict=True):
        scores, verdict = _judged(one, None, reference, (), found, reporter)
        scored.append(scores)
        verdicts.append(verdict)
    known = len(reference.windows.ids)
    while undecided := [number for number, one in enumerate(verdicts) if one.verdict == "undecided"]:
        further = more.draw(known)
        if further is None:
            break
        known += len(further.windows.ids)
        for number in undecided:
            one, before = candidates[number], verdicts[number]
            scored[number], verdicts[number] = _judged(
                one, scored[number], further, before.looks, before.weights, reporter
            )
    reporter.scored()
    return verdicts


def _judged(
    one: Candidate,
    before: Scored | None,
    reference: Reference,
    looks: tuple[int, ...],
    weights: WeightsResult | None,
    reporter: Reporter,
) -> tuple[Scored | None, Verification]:
    """Score an artifact on windows and judge it on these and those before; no scores are left if it cannot be.

    Raises:
        RuntimeScoreError: it could not be scored, for what is not its fault.
    """
    try:
        scores = score_in(one.runtime, one.entry, one.label, reference, reporter)
    except RuntimeScoreError as error:
        if is_of_the_run(error) or not one.served:
            raise
        reason = unscored_reason(error, "not scored", one.runtime.name, one.entry)
        return None, not_scored(one.runtime.version(), reason, one.gate, weights)
    scores = scores if before is None else before.plus(scores)
    comparison = scores.compare()
    looks = (*looks, comparison.tokens_scored)
    return scores, judge(one.runtime.version(), comparison, one.gate, weights, looks)


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
