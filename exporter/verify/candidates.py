"""Scores artifacts against the reference, each in its own runtime, and judges them.

While the verdict on an artifact is undecided, as many windows again as it was scored on are drawn, until there are as
many as may be. Three looks, which the default numbers of tokens make, about double the chance that a figure exactly at
its limit gets past it: by simulation from 2.5 % to 5.8 % where the means of windows are normal, and from 4.8 % to 9.7 %
where they are log-normal and as unlike as a real model's KL divergences (`scripts/measurements/repeated_looks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.backends.base import Backend
from exporter.errors import RuntimeScoreError
from exporter.merge.model import MergedModel
from exporter.plan.gate_limits import Gate
from exporter.plan.reporter import Reporter
from exporter.reference.further_tokens import MoreTokens
from exporter.runtimes.base import Runtime
from exporter.verify.gate import Verification, judge, not_scored
from exporter.verify.scores.not_scored import is_of_the_run, unscored_reason
from exporter.verify.scores.score import Scored, score_in
from exporter.verify.weights.check import Check, WeightsResult, check_weights, read_weights

if TYPE_CHECKING:
    from exporter.reference.predictions import Reference


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
    `exporter.verify.scores.not_scored`.

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
