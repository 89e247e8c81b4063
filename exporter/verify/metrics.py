"""Paired comparison of two sets of token scores. Arrays in, numbers out."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.runtimes.base import TokenScores


@dataclass(frozen=True)
class Spread:
    """How far an artifact's predictions are from the reference's, KL(reference ‖ artifact) in nats.

    Attributes:
        mean: over all positions.
        stderr: standard error of the mean.
        median: half of the positions are closer.
        p99: 99 % of the positions are closer.
        largest: the farthest position.
    """

    mean: float
    stderr: float
    median: float
    p99: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """An artifact against the reference, on the same tokens.

    Attributes:
        tokens_scored: number of predictions.
        perplexity: exp of the artifact's mean negative log-probability.
        perplexity_stderr: its own standard error, as llama-perplexity prints it (unpaired).
        reference_perplexity: the reference's perplexity.
        delta: perplexity / reference_perplexity - 1.
        delta_log: difference of the mean negative log-probabilities.
        delta_stderr: standard error of `delta_log` by the differences token by token.
        same_top: share of predictions whose likeliest token is the same.
        divergence: of the whole predictions; None from a runtime that does not give them.
    """

    tokens_scored: int
    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float
    delta: float
    delta_log: float
    delta_stderr: float
    same_top: float
    divergence: Spread | None = None


def spread(values: npt.NDArray[np.float64]) -> Spread | None:
    """Summarize divergences by position; None if there are none (NaN everywhere).

    Raises:
        ValueError: some are there and some are not.
    """
    if np.isnan(values).all():
        return None
    if not np.isfinite(values).all():
        raise ValueError("a divergence is not finite")
    flat = values.ravel()
    median, p99 = np.quantile(flat, (0.5, 0.99))
    return Spread(float(flat.mean()), _stderr(flat), float(median), float(p99), float(flat.max()))


def compare(
    artifact: TokenScores, reference: TokenScores, divergences: npt.NDArray[np.float64] | None = None
) -> Comparison:
    """Compare two runs over the same windows.

    The standard error of the difference is the paired one, sd(d) / sqrt(N) over the per-token differences d: the two
    models stumble over the same tokens, so it is far smaller than the error of either perplexity.

    Args:
        artifact: its scores.
        reference: the trained model's.
        divergences: KL(reference ‖ artifact) by position, if they are known.

    Raises:
        ValueError: the shapes differ, or a score is not finite.
    """
    if artifact.log_probabilities.shape != reference.log_probabilities.shape:
        raise ValueError(f"{artifact.log_probabilities.shape} against {reference.log_probabilities.shape}")
    ours, theirs = -artifact.log_probabilities.ravel(), -reference.log_probabilities.ravel()
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a log-probability is not finite")
    perplexity, reference_perplexity = _exp(ours.mean()), _exp(theirs.mean())
    difference = ours - theirs
    return Comparison(
        tokens_scored=ours.size,
        perplexity=perplexity,
        perplexity_stderr=min(perplexity * _stderr(ours), sys.float_info.max),
        reference_perplexity=reference_perplexity,
        delta=perplexity / reference_perplexity - 1,
        delta_log=float(difference.mean()),
        delta_stderr=_stderr(difference),
        same_top=float((artifact.top_tokens == reference.top_tokens).mean()),
        divergence=None if divergences is None else spread(divergences),
    )


def _exp(value: float) -> float:
    """exp, or the largest float where that overflows: the figure of a ruined artifact still has to be written down."""
    try:
        return math.exp(value)
    except OverflowError:
        return sys.float_info.max


def _stderr(values: npt.NDArray[np.float64]) -> float:
    """Standard error of the mean, sqrt(var / (N - 1)) with the biased variance, as in llama-perplexity."""
    return math.sqrt(float(values.var()) / max(1, values.size - 1))
