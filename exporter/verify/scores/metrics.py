"""Paired comparison of two sets of token scores. Arrays in, numbers out."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.runtimes.base import TokenScores
from exporter.verify.scores.intervals import clustered_stderr, interval

Floats = npt.NDArray[np.float64]

# What a profile of the KL divergence shows: its tails as closely as its middle.
KL_QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# Runs of positions along the scored part of a window, and bins of a probability.
KL_RUNS = 16
PROBABILITY_BINS = 10


@dataclass(frozen=True)
class Divergences:
    """How far an artifact's predictions are from the reference's, position by position; each None where not known.

    Attributes:
        kl: KL(reference ‖ artifact) over the vocabulary in nats, float64, shape (windows, scored).
        jensen_shannon: Jensen-Shannon divergence over the vocabulary in bits, same shape.
        top_k: KL(reference ‖ artifact) in nats over the artifact's k likeliest tokens and one bucket for all others,
            same shape: at most `kl`, and never to be compared with it.
        k: tokens of the top-k form.
    """

    kl: Floats | None = None
    jensen_shannon: Floats | None = None
    top_k: Floats | None = None
    k: int = 0

    def plus(self, other: Divergences) -> Divergences:
        """Both, one after the other, as far as they are known of both."""
        return Divergences(
            _joined(self.kl, other.kl),
            _joined(self.jensen_shannon, other.jensen_shannon),
            _joined(self.top_k, other.top_k),
            self.k,
        )


def _joined(left: Floats | None, right: Floats | None) -> Floats | None:
    return None if left is None or right is None else np.concatenate([left, right])


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error.

    Attributes:
        value: the figure.
        stderr: its standard error over the windows; None for one window.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Spread:
    """How far an artifact's predictions are from the reference's, over all positions.

    Attributes:
        mean: over all positions.
        stderr: standard error of the mean over the windows; None for one window.
        median: half of the positions are closer.
        p90: 90 % of the positions are closer.
        p95: 95 % of the positions are closer.
        p99: 99 % of the positions are closer.
        largest: the farthest position.
        interval: 95 % interval of the mean; None for one window.
    """

    mean: float
    stderr: float | None
    median: float
    p90: float
    p95: float
    p99: float
    largest: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class TopKSpread(Spread):
    """KL divergence in the top-k form: a lower bound of the full one, and not comparable with it.

    Attributes:
        k: likeliest tokens of the artifact that count on their own.
    """

    k: int


@dataclass(frozen=True)
class Profile:
    """How a comparison's figures are spread: what its plots show.

    Attributes:
        kl_quantiles: `KL_QUANTILES` of the KL divergence over all positions, each with its value in nats; None where
            that divergence is not known.
        kl_along_window: the mean KL divergence in nats of runs of neighbouring positions, over all windows, each with
            its first position, counted from 0 at the first that is scored; None likewise.
        probability: predictions by the right token's probability in the reference (rows) and in the artifact
            (columns), in tenths from 0 to 1; 1 itself is in the last.
    """

    kl_quantiles: tuple[tuple[float, float], ...] | None
    kl_along_window: tuple[tuple[int, float], ...] | None
    probability: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """An artifact against the reference, on the same tokens.

    Standard errors and intervals rest on the means of the windows (`clustered_stderr`) but for `perplexity_stderr`.
    They say what other windows of such text would give, and nothing about text of another kind.

    Attributes:
        tokens_scored: number of predictions.
        perplexity: exp of the artifact's mean negative log-probability.
        perplexity_stderr: its own standard error, as llama-perplexity prints it (unpaired, position by position).
        reference_perplexity: the reference's perplexity.
        delta: perplexity / reference_perplexity - 1.
        delta_interval: 95 % interval of `delta`: exp of the ends of `delta_log_interval`, minus 1.
        delta_log: difference of the mean negative log-probabilities.
        delta_stderr: standard error of `delta_log` by the differences token by token; None for one window.
        delta_log_interval: 95 % interval of `delta_log`; None for one window.
        same_top: share of predictions whose likeliest token is the same.
        same_top_stderr: standard error of `same_top`; None for one window.
        same_top_interval: 95 % interval of `same_top`, as far as a share reaches: within 0 and 1; None likewise.
        probability_change: mean change of the right token's probability, artifact minus reference.
        probability_rms: root of the mean square of that change.
        divergence: KL(reference ‖ artifact) of the whole predictions in nats; None from a runtime that does not give
            them.
        jensen_shannon: Jensen-Shannon divergence of the whole predictions in bits, from 0 to 1; None likewise.
        top_k_divergence: KL divergence in the top-k form in nats, from a runtime that gives no more.
        profile: how the figures are spread over positions; None if that was not looked at.
    """

    tokens_scored: int
    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float
    delta: float
    delta_interval: tuple[float, float] | None
    delta_log: float
    delta_stderr: float | None
    delta_log_interval: tuple[float, float] | None
    same_top: float
    same_top_stderr: float | None
    same_top_interval: tuple[float, float] | None
    probability_change: Estimate
    probability_rms: Estimate
    divergence: Spread | None = None
    jensen_shannon: Spread | None = None
    top_k_divergence: TopKSpread | None = None
    profile: Profile | None = None


def spread(values: Floats) -> Spread:
    """Summarize divergences by position.

    Args:
        values: shape (windows, scored).

    Raises:
        ValueError: one is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("a divergence is not finite")
    median, p90, p95, p99 = map(float, np.quantile(values, (0.5, 0.9, 0.95, 0.99)))
    mean, stderr = float(values.mean()), clustered_stderr(values)
    return Spread(mean, stderr, median, p90, p95, p99, float(values.max()), _ends(mean, stderr, len(values)))


def _ends(mean: float, stderr: float | None, windows: int) -> tuple[float, float] | None:
    return None if stderr is None else interval(mean, stderr, windows)


def _share_ends(mean: float, stderr: float | None, windows: int) -> tuple[float, float] | None:
    """The interval of a share: few windows that differ reach beyond what a share can be."""
    ends = _ends(mean, stderr, windows)
    return None if ends is None else (max(0.0, ends[0]), min(1.0, ends[1]))


def compare(artifact: TokenScores, reference: TokenScores, divergences: Divergences | None = None) -> Comparison:
    """Compare two runs over the same windows.

    The difference is taken token by token: the two models stumble over the same tokens, so its error is far smaller
    than that of either perplexity.

    Args:
        artifact: its scores.
        reference: the trained model's.
        divergences: by position, as far as they are known.

    Raises:
        ValueError: the shapes differ, or a score or a divergence is not finite.
    """
    ours, theirs = -artifact.log_probabilities, -reference.log_probabilities
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape} against {theirs.shape}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a log-probability is not finite")
    perplexity, reference_perplexity = _exp(ours.mean()), _exp(theirs.mean())
    difference, change = ours - theirs, np.exp(-ours) - np.exp(-theirs)
    same_top = (artifact.top_tokens == reference.top_tokens).astype(np.float64)
    delta_log, delta_stderr = float(difference.mean()), clustered_stderr(difference)
    ends = _ends(delta_log, delta_stderr, len(difference))
    same_top_mean, same_top_stderr = float(same_top.mean()), clustered_stderr(same_top)
    known = divergences or Divergences()
    return Comparison(
        tokens_scored=ours.size,
        perplexity=perplexity,
        perplexity_stderr=min(perplexity * _stderr(ours), sys.float_info.max),
        reference_perplexity=reference_perplexity,
        delta=perplexity / reference_perplexity - 1,
        delta_interval=None if ends is None else (_exp(ends[0]) - 1, _exp(ends[1]) - 1),
        delta_log=delta_log,
        delta_stderr=delta_stderr,
        delta_log_interval=ends,
        same_top=same_top_mean,
        same_top_stderr=same_top_stderr,
        same_top_interval=_share_ends(same_top_mean, same_top_stderr, len(same_top)),
        probability_change=Estimate(float(change.mean()), clustered_stderr(change)),
        probability_rms=_root_mean_square(change),
        divergence=None if known.kl is None else spread(known.kl),
        jensen_shannon=None if known.jensen_shannon is None else spread(known.jensen_shannon),
        top_k_divergence=None if known.top_k is None else TopKSpread(**vars(spread(known.top_k)), k=known.k),
        profile=profile(np.exp(-ours), np.exp(-theirs), known.kl),
    )


def profile(ours: Floats, theirs: Floats, kl: Floats | None) -> Profile:
    """How figures are spread over positions.

    Args:
        ours: the right token's probability in the artifact, shape (windows, scored).
        theirs: the same in the reference.
        kl: the KL divergence in nats, same shape; None where it is not known.
    """
    quantiles = along = None
    if kl is not None:
        quantiles = tuple(zip(KL_QUANTILES, map(float, np.quantile(kl, KL_QUANTILES)), strict=True))
        runs = np.array_split(np.arange(kl.shape[1]), min(KL_RUNS, kl.shape[1]))
        along = tuple((int(run[0]), float(kl[:, run].mean())) for run in runs)
    last = PROBABILITY_BINS - 1
    rows, columns = (np.minimum(values * PROBABILITY_BINS, last).astype(np.int64).ravel() for values in (theirs, ours))
    counts = np.bincount(rows * PROBABILITY_BINS + columns, minlength=PROBABILITY_BINS**2)
    return Profile(quantiles, along, tuple(map(tuple, counts.reshape(PROBABILITY_BINS, -1).tolist())))


def _root_mean_square(values: Floats) -> Estimate:
    """Its error is that of the mean square by the delta method: d sqrt(x) = dx / (2 sqrt(x))."""
    root, stderr = math.sqrt(float(np.square(values).mean())), clustered_stderr(np.square(values))
    return Estimate(root, stderr / (2 * root) if stderr and root else stderr)


def _exp(value: float) -> float:
    """exp, or the largest float where that overflows: the figure of a ruined artifact still has to be written down."""
    try:
        return math.exp(value)
    except OverflowError:
        return sys.float_info.max


def _stderr(values: Floats) -> float:
    """Standard error of the mean, sqrt(var / (N - 1)) with the biased variance, as in llama-perplexity."""
    return math.sqrt(float(values.var()) / max(1, values.size - 1))
