"""Errors and intervals of means over windows: known quantiles, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from exporter.runtimes.base import TokenScores
from exporter.verify.scores.intervals import clustered_stderr, interval, t_quantile
from exporter.verify.scores.metrics import compare, spread

# Published tables of Student's t, 97.5 %.
QUANTILES = {1: 12.7062, 2: 4.3027, 4: 2.7764, 7: 2.3646, 15: 2.1314, 30: 2.0423, 120: 1.9799, 10**6: 1.96}


@pytest.mark.parametrize(("degrees", "expected"), QUANTILES.items())
def test_quantiles_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, rel=4e-4)


def test_the_worst_quantile_is_as_near_as_it_says() -> None:
    assert t_quantile(3) == pytest.approx(3.18245, rel=1.3e-3)
    assert [t_quantile(n) for n in range(1, 50)] == sorted((t_quantile(n) for n in range(1, 50)), reverse=True)


def test_no_degrees_of_freedom_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 degrees"):
        t_quantile(0)


def test_by_hand() -> None:
    values = np.array([[1.0, 3.0], [4.0, 6.0], [9.0, 7.0]])
    # Means 2, 5 and 8 around 5: variance 9, over three windows.
    error = clustered_stderr(values)
    assert error == pytest.approx(math.sqrt(3))
    assert interval(5.0, math.sqrt(3), 3) == pytest.approx((5 - 4.30265 * 3**0.5, 5 + 4.30265 * 3**0.5), rel=1e-5)


def test_one_window_has_no_error() -> None:
    assert clustered_stderr(np.array([[1.0, 2.0, 3.0]])) is None


SCORED = 255
TRUE = 0.01
TRIALS = 1500


def draw(generator: np.random.Generator, windows: int, effect: float) -> npt.NDArray[np.float64]:
    """Differences by position: skewed and heavy-tailed as real ones, with something that a window has in common.

    The variance of the windows' means is 1 + 255 · effect² times that of independent positions.
    """
    common = effect * generator.normal(size=(windows, 1))
    return np.asarray(TRUE + 0.1 * (common + generator.standard_t(5, (windows, SCORED)) / math.sqrt(5 / 3)))


def covered(windows: int, effect: float, trials: int = 1500) -> tuple[float, float]:
    """How often the 95 % interval of `compare` holds the truth, and how often one by independent positions would."""
    generator = np.random.default_rng(windows)
    clustered = independent = 0
    for _ in range(trials):
        reference = -generator.gamma(1.0, 2.0, (windows, SCORED)) - 2
        tops = np.zeros(reference.shape, np.int64)
        differences = draw(generator, windows, effect)
        found = compare(TokenScores(reference - differences, tops), TokenScores(reference, tops))
        assert found.delta_log_interval is not None
        clustered += found.delta_log_interval[0] <= TRUE <= found.delta_log_interval[1]
        independent += abs(found.delta_log - TRUE) <= 1.96 * differences.std(ddof=1) / math.sqrt(differences.size)
    return clustered / trials, independent / trials


# An effect of 0.1063 makes the variance of the windows' means 3.88 times as large: what the demo in Q4_K_M has.
@pytest.mark.parametrize(("windows", "effect"), [(2, 0.1063), (3, 0.1063), (8, 0.0), (8, 0.1063), (32, 0.1063)])
def test_a_95_percent_interval_holds_the_truth_in_95_percent(windows: int, effect: float) -> None:
    clustered, independent = covered(windows, effect, 600 if windows == 32 else 1500)
    # Three standard errors of a share over so many trials; the quantile of the normal would give 0.91 at 8 windows.
    assert clustered == pytest.approx(0.95, abs=0.017 if windows < 32 else 0.027)
    if effect:
        assert independent < 0.8


KL, SAME_TOP = 0.03, 0.915


def draw_divergence(
    generator: np.random.Generator, windows: int, effect: float, skew: float
) -> npt.NDArray[np.float64]:
    """Divergences by position: log-normal, so skewed, times a log-normal factor that a window has in common."""
    common = effect * generator.normal(size=(windows, 1)) - effect**2 / 2
    return np.asarray(KL * np.exp(common + skew * generator.normal(size=(windows, SCORED)) - skew**2 / 2))


def draw_same_top(generator: np.random.Generator, windows: int, unlike: bool) -> npt.NDArray[np.float64]:
    """1 or 0 by position, with a share of its own for every window where these are unlike.

    The variance of the windows' means is 3 times that of independent positions then.
    """
    share = generator.beta(125 * SAME_TOP, 125 * (1 - SAME_TOP), (windows, 1)) if unlike else SAME_TOP
    return (generator.random((windows, SCORED)) < share).astype(np.float64)


def held(values: npt.NDArray[np.float64], truth: float) -> bool:
    """Whether a 95 % interval by independent positions holds the truth."""
    return bool(abs(values.mean() - truth) <= 1.96 * values.std(ddof=1) / math.sqrt(values.size))


# The demo in Q4_K_M: positions vary by 0.8 of their mean and windows by 0.2, so that the variance of the windows' means
# is 17 times as large. Twice as uneven windows of very skewed positions are more than 8 of them tell.
@pytest.mark.parametrize(
    ("windows", "effect", "skew", "share"),
    [(8, 0.0, 0.7, 0.95), (8, 0.21, 0.7, 0.94), (32, 0.21, 0.7, 0.95), (8, 0.45, 1.5, 0.92), (32, 0.45, 1.5, 0.93)],
)
def test_the_interval_of_a_divergence_holds_the_truth(windows: int, effect: float, skew: float, share: float) -> None:
    generator = np.random.default_rng(windows)
    clustered = independent = 0
    for _ in range(TRIALS):
        values = draw_divergence(generator, windows, effect, skew)
        found = spread(values).interval
        assert found is not None
        clustered += found[0] <= KL <= found[1]
        independent += held(values, KL)
    # Over three standard errors of a share of so many trials; the normal's quantile would give 0.04 less at 8 windows.
    assert clustered / TRIALS == pytest.approx(share, abs=0.02)
    if effect:
        assert independent / TRIALS < 0.6


@pytest.mark.parametrize(("windows", "unlike"), [(8, False), (8, True), (32, True)])
def test_the_interval_of_the_same_top_token_holds_the_truth(windows: int, unlike: bool) -> None:
    generator = np.random.default_rng(windows)
    scores = np.full((windows, SCORED), -1.0)
    clustered = independent = 0
    for _ in range(TRIALS):
        values = draw_same_top(generator, windows, unlike)
        reference = TokenScores(scores, np.zeros(scores.shape, np.int64))
        found = compare(TokenScores(scores, (values == 0).astype(np.int64)), reference).same_top_interval
        assert found is not None
        clustered += found[0] <= SAME_TOP <= found[1]
        independent += held(values, SAME_TOP)
    assert clustered / TRIALS == pytest.approx(0.95, abs=0.017)
    if unlike:
        assert independent / TRIALS < 0.8
