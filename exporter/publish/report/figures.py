"""The figures of an artifact that the manifest has: value, 95 % interval, limit and verdict of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from exporter.publish.report.nodes import CHANGE, NATS, PERCENT, Format, Node, Unit
from exporter.verify.scores.intervals import interval

# 95 % of a normal distribution, for an error that does not come from a few windows.
NORMAL_REACH = 1.96


@dataclass(frozen=True)
class Figure:
    """A figure against its limit.

    Attributes:
        name: its name.
        about: its meaning, in a few words.
        value: the figure.
        unit: how it is written.
        ends: its 95 % interval; None if there is one window.
        interval: the interval's place in the manifest; None if it follows from `error`.
        error: the place of the standard error that the interval follows from.
        limit: its limit; None if it has none.
        kind: `within`, `at_most` or `at_least`.
        ideal: its value if nothing was lost; the middle of `within`.
        verdict: passed, failed or undecided; None if it has no limit.
    """

    name: str
    about: str
    value: Node
    unit: Unit
    ends: tuple[float, float] | None = None
    interval: Node | None = None
    error: Node | None = None
    limit: Node | None = None
    kind: str = "at_most"
    ideal: float = 0.0
    verdict: str | None = None

    @property
    def text(self) -> Format:
        """Writes the value and the ends, with the digits that the interval leaves."""
        if self.ends is None:
            return self.unit.text
        return self.unit.fixed((self.ends[1] - self.ends[0]) / 2 or self.value.value)

    @property
    def sign(self) -> str:
        """The sign before the limit."""
        return {"within": "±", "at_most": "≤ ", "at_least": "≥ "}[self.kind]

    @property
    def allowed(self) -> tuple[float, float]:
        """The values that the limit allows; all values if there is no limit."""
        if self.limit is None:
            return -math.inf, math.inf
        limit = float(self.limit.value)
        within = (self.ideal - limit, self.ideal + limit)
        return {"within": within, "at_most": (-math.inf, limit), "at_least": (limit, math.inf)}[self.kind]


def figures(artifact: Node, evaluation: Node) -> list[Figure]:
    """The figures on scores, then those on weights. An artifact that was not verified has none.

    Args:
        artifact: one of `artifacts`.
        evaluation: the manifest's `evaluation`.
    """
    verification = artifact["verification"]
    scores = [] if verification["delta"].value is None else _scores(verification, evaluation)
    return [*scores, *_weights(artifact["weights"])]


def windows_of(verification: Node, evaluation: Node) -> int:
    """The number of scored windows. It is larger than that of `evaluation` if more were drawn for a verdict."""
    per_window = evaluation["tokens_scored"].value / evaluation["windows"].value
    return round(float(verification["tokens_scored"].value / per_window))


def _scores(verification: Node, evaluation: Node) -> Iterator[Figure]:
    windows = windows_of(verification, evaluation)
    checks = {check["name"].value: check for check in verification["checks"]}

    def judged(name: str, figure: Figure) -> Figure:
        figure = replace(figure, ends=_ends(figure, windows))
        return _by_check(figure, checks[name]) if name in checks else figure

    delta = Figure("Perplexity change", "against the trained model", verification["delta"], CHANGE, kind="within")
    yield judged("perplexity", replace(delta, interval=verification["delta_interval"]))
    if kl := verification["kl_divergence"]:
        mean = Figure("KL divergence", "mean over predictions, in nats", kl["mean"], NATS, error=kl["stderr"])
        yield judged("kl_divergence", mean)
    if top := verification["top_k_divergence"]:
        name, about = f"KL of the top {top['k'].value}", "mean, in nats: a lower bound of KL divergence"
        yield judged("top_k_divergence", Figure(name, about, top["mean"], NATS, error=top["stderr"]))
    if shannon := verification["jensen_shannon"]:
        about = "mean over predictions, in bits"
        yield judged("", Figure("Jensen-Shannon divergence", about, shannon["mean"], NATS, error=shannon["stderr"]))
    same = Figure("Same top token", "share of predictions", verification["same_top"], PERCENT, kind="at_least", ideal=1)
    ends, error = verification["same_top_interval"], verification["same_top_stderr"]
    yield judged("same_top", replace(same, interval=ends, error=error))
    rms = verification["probability_rms"]
    yield judged("", Figure("RMS Δp", "of the right token's probability", rms["value"], PERCENT, error=rms["stderr"]))


def _ends(figure: Figure, windows: int) -> tuple[float, float] | None:
    if figure.interval:
        low, high = figure.interval.value
        return low, high
    if figure.error is None or figure.error.value is None or windows < 2:
        return None
    return interval(figure.value.value, figure.error.value, windows)


def _by_check(figure: Figure, check: Node) -> Figure:
    """The figure with the gate's value and verdict in place of its own."""
    figure = replace(figure, value=check["value"], kind=check["kind"].value)
    # A lifted limit decides nothing.
    if check["limit"].value is not None:
        figure = replace(figure, limit=check["limit"], verdict=check["verdict"].value)
    if not check["interval"]:
        return figure
    low, high = check["interval"].value
    return replace(figure, ends=(low, high), interval=check["interval"], error=None)


def _by_limit(figure: Figure) -> Figure:
    if figure.limit is None or figure.limit.value is None:
        return replace(figure, limit=None)
    low, high = figure.allowed
    return replace(figure, verdict="passed" if low <= figure.value.value <= high else "failed")


def _weights(weights: Node) -> Iterator[Figure]:
    """The figures on weights. Limits on errors go by tensor and type, so the reasons name what breaks one."""
    if weights["relative_error"].value is not None:
        about = "of what is stored, against the merge"
        yield Figure("Weights, relative error", about, weights["relative_error"], PERCENT)
    for worst in list(weights["worst"])[:1]:
        if worst["relative_error"].value is not None:
            figure = Figure("Worst weight for its type", worst["name"].value, worst["relative_error"], PERCENT)
            yield _by_limit(replace(figure, limit=worst["limit"]))
    survival, error, limit = weights["survival"], weights["survival_stderr"], weights["survival_limit"]
    if survival.value is not None:
        figure = Figure("Delta survival", "share of the adapter's change that is stored", survival, PERCENT)
        if error.value is not None:
            reach = NORMAL_REACH * error.value
            figure = replace(figure, error=error, ends=(survival.value - reach, survival.value + reach))
        yield _by_limit(replace(figure, limit=limit, kind="within", ideal=1))
    if weights["delta_error"].value is not None:
        yield Figure("Delta, relative error", "of the stored change, over that change", weights["delta_error"], PERCENT)
