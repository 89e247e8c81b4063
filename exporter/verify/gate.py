"""The gate: figures with their intervals against limits, and a verdict that can fail the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from exporter.plan.gate_limits import Gate
from exporter.verify.answers.judge import Answers
from exporter.verify.scores.metrics import Comparison

if TYPE_CHECKING:
    from exporter.verify.weights.check import WeightsResult


def with_answers(verification: Verification, answers: Answers | str | None) -> Verification:
    """A verdict with an artifact's answers, or with why there are none."""
    if isinstance(answers, str):
        return replace(verification, not_answered=answers)
    return replace(verification, answers=answers)


Verdict = Literal["passed", "failed", "undecided"]
# How a figure keeps its limit: its magnitude is at most that, or it is, or it is at least that.
Kind = Literal["within", "at_most", "at_least"]


@dataclass(frozen=True)
class Check:
    """One figure against its limit.

    It passes or fails where the whole of its 95 % interval lies on one side of the limit, and is undecided where the
    interval straddles it, or where there is no interval because there is but one window.

    Attributes:
        name: `perplexity` (its relative change), `kl_divergence` or `top_k_divergence` (its mean, in nats), or
            `same_top` (a share).
        value: the figure.
        interval: its 95 % interval; None for one window.
        limit: what it is held against.
        kind: how.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    limit: float
    kind: Kind

    @property
    def verdict(self) -> Verdict:
        """What is known of it."""
        if not math.isfinite(self.value):
            return "failed"
        if math.isinf(self.limit):
            return "passed"
        low, high = self.interval or _RANGES[self.name]
        limit = self.limit
        if self.kind == "at_least":
            low, high, limit = -high, -low, -limit
        if self.kind == "within":
            # The least and the largest magnitude in the interval.
            low, high = (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
        return "passed" if high <= limit else "failed" if low > limit else "undecided"

    def reason(self) -> str:
        """What is wrong, in words."""
        what, form = _WORDS[self.name]
        limit = f"{'±' if self.kind == 'within' else ''}{_shown(self.limit, form.lstrip('+'))}"
        text = f"{what} {_shown(self.value, form)}, the limit is {limit}"
        if self.verdict != "undecided":
            return text
        if self.interval is None:
            return f"{text}: undecided, one window has no interval"
        ends = " to ".join(_shown(end, form) for end in self.interval)
        return f"{text}: undecided, its 95 % interval is {ends}"


# What a figure can be, which is all that one window says of the others.
_RANGES = {
    "perplexity": (-1.0, math.inf),
    "kl_divergence": (0.0, math.inf),
    "top_k_divergence": (0.0, math.inf),
    "same_top": (0.0, 1.0),
}
# Of each check: what it says, and how its figure is shown.
_WORDS = {
    "perplexity": ("perplexity changes by", "+.2%"),
    "kl_divergence": ("the KL divergence from the trained model is", ".4f"),
    "top_k_divergence": ("the KL divergence from the trained model (top-k form) is at least", ".4f"),
    "same_top": ("the same top token in", ".1%"),
}


def _shown(value: float, form: str) -> str:
    return f"{value:{form}}" + ("" if form.endswith("%") else " nats")


@dataclass(frozen=True)
class Verification:
    """The verdict on one artifact.

    Attributes:
        runtime: what scored it, with its version.
        comparison: its scores against the reference's; None if it could not be scored.
        gate: the limits.
        checks: its figures against them; none without scores.
        looks: predictions that had been scored at each look at the figures; more are drawn while they are undecided.
        answers: what it answered, None if it was not asked; faults in it are among what is broken.
        weights: what is in its stored weights; None if they cannot be read back.
        not_scored: why it could not be scored, in words, which is a fault of its own; None if it was.
        not_answered: why it could not answer, likewise; None if it did, or was not asked.
    """

    runtime: str
    comparison: Comparison | None
    gate: Gate
    checks: tuple[Check, ...]
    looks: tuple[int, ...]
    answers: Answers | None = None
    weights: WeightsResult | None = None
    not_scored: str | None = None
    not_answered: str | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        """What more tokens would not change, in words: weights and answers that are wrong, and no scores at all."""
        return (*self._loaded, *self._answered)

    @property
    def _loaded(self) -> tuple[str, ...]:
        """What is wrong with the weights, and that the runtime could not score them."""
        weights = self.weights.broken if self.weights else ()
        return (*weights, *((self.not_scored,) if self.not_scored is not None else ()))

    @property
    def _answered(self) -> tuple[str, ...]:
        answers = self.answers.faults if self.answers else ()
        return (*answers, *((self.not_answered,) if self.not_answered is not None else ()))

    @property
    def verdict(self) -> Verdict:
        """Failed by any fault or figure; else undecided by any figure; else passed."""
        found = {check.verdict for check in self.checks}
        if self.faults or "failed" in found:
            return "failed"
        return "undecided" if "undecided" in found else "passed"

    @property
    def passed(self) -> bool:
        """Whether it may be published: what is undecided in the end may not."""
        return self.verdict == "passed"

    @property
    def broken(self) -> tuple[str, ...]:
        """Why it did not pass, in words; empty if it did. What is undecided is no reason where something failed."""
        figures = [check.reason() for check in self.checks if check.verdict == self.verdict != "passed"]
        return (*self._loaded, *figures, *self._answered)


def judge(
    runtime: str,
    comparison: Comparison,
    gate: Gate,
    weights: WeightsResult | None = None,
    looks: tuple[int, ...] | None = None,
) -> Verification:
    """Hold an artifact's scores in a runtime, and its stored weights, against the limits.

    Args:
        runtime: what scored it, with its version.
        comparison: its scores.
        gate: the limits.
        weights: what is in its stored weights.
        looks: as of `Verification`; None where this is the first.
    """
    checks = tuple(_checks(comparison, gate))
    return Verification(runtime, comparison, gate, checks, looks or (comparison.tokens_scored,), weights=weights)


def not_scored(runtime: str, reason: str, gate: Gate, weights: WeightsResult | None = None) -> Verification:
    """The verdict on an artifact that could not be scored: failed, whatever is in its weights.

    Args:
        runtime: what was to score it, with its version.
        reason: why it could not, in words.
        gate: the limits.
        weights: what is in its stored weights.
    """
    return Verification(runtime, None, gate, (), (), weights=weights, not_scored=reason)


def _checks(found: Comparison, gate: Gate) -> list[Check]:
    checks = [Check("perplexity", found.delta, found.delta_interval, gate.max_delta, "within")]
    # Each form has a limit of its own: the top-k form is a lower bound of the other, and may be much less.
    for name, spread, limit in (
        ("kl_divergence", found.divergence, gate.max_divergence),
        ("top_k_divergence", found.top_k_divergence, gate.max_top_k_divergence),
    ):
        if spread is not None:
            checks.append(Check(name, spread.mean, spread.interval, limit, "at_most"))
    checks.append(Check("same_top", found.same_top, found.same_top_interval, gate.min_same_top, "at_least"))
    return checks
