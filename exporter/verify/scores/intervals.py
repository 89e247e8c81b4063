"""Errors and intervals of means over windows. Arrays in, numbers out."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt


def clustered_stderr(values: npt.NDArray[np.float64]) -> float | None:
    """Standard error of the mean over all positions, where the positions of a window belong together.

    The windows are the clusters: sqrt(sum (m_w - m)² / (W (W - 1))) over the W means of windows, which is the
    cluster-robust error for clusters of one size (Cameron and Miller, "A Practitioner's Guide to Cluster-Robust
    Inference", Journal of Human Resources 50, 2015; for evaluations of language models: Miller, "Adding Error Bars to
    Evals", arXiv:2411.00640, section 2.2). An error that takes every position for a draw of its own is too small: the
    text of a window is of one kind, and so is what quantization does to it.

    Args:
        values: one value a position, shape (windows, scored).

    Returns:
        The error in the unit of the values; None for one window, which does not tell how windows differ.
    """
    windows = values.shape[0]
    if windows < 2:
        return None
    return float(values.mean(axis=1).std(ddof=1)) / math.sqrt(windows)


def interval(mean: float, stderr: float, windows: int) -> tuple[float, float]:
    """The 95 % interval of a mean whose error comes from the means of so many windows: mean ± t(W - 1) · stderr.

    Args:
        mean: the mean.
        stderr: its `clustered_stderr`.
        windows: W, at least 2.
    """
    reach = t_quantile(windows - 1) * stderr
    return mean - reach, mean + reach


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution.

    Closed forms for 1 and 2 degrees of freedom, and from 3 on the expansion around the normal quantile of Abramowitz
    and Stegun, "Handbook of Mathematical Functions", 26.7.5: 0.12 % too small for 3, 0.03 % for 4,
    less than 0.02 % from 5 on.

    Args:
        degrees: degrees of freedom, at least 1.

    Raises:
        ValueError: there are none.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom")
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return math.sqrt(2 / (0.05 * 1.95) - 2)
    x = NormalDist().inv_cdf(0.975)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / math.pow(degrees, power) for power, term in enumerate(terms))
