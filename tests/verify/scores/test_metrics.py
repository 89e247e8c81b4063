"""Perplexities, paired errors and agreement: against direct formulas, and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exporter.plan.gate_limits import FALLBACK_GATE, Gate
from exporter.runtimes.base import TokenScores
from exporter.verify.gate import judge
from exporter.verify.scores.metrics import Divergences, Estimate, compare, profile, spread

Floats = npt.NDArray[np.float64]


def scores(log_probabilities: Any, top: Any = None) -> TokenScores:
    values = np.atleast_2d(np.asarray(log_probabilities, dtype=np.float64))
    tops = np.zeros(values.shape, dtype=np.int64) if top is None else np.atleast_2d(np.asarray(top))
    return TokenScores(values, tops)


def test_a_small_example_by_hand() -> None:
    artifact = scores([[math.log(0.5), math.log(0.25)], [math.log(0.125), math.log(1.0)]], [[1, 2], [3, 4]])
    reference = scores([[math.log(0.5), math.log(0.5)], [math.log(0.5), math.log(0.5)]], [[1, 9], [3, 4]])
    found = compare(artifact, reference)
    assert found.tokens_scored == 4
    # Mean negative logarithms of 1/2: (1 + 2 + 3 + 0) / 4 against 1.
    assert found.perplexity == pytest.approx(2**1.5)
    assert found.reference_perplexity == pytest.approx(2.0)
    assert found.delta == pytest.approx(2**0.5 - 1)
    assert found.delta_log == pytest.approx(0.5 * math.log(2))
    # Differences 0, 1 and 2, -1 in units of ln 2: both windows have the mean 0.5.
    assert found.delta_stderr == pytest.approx(0.0)
    assert found.delta_interval == pytest.approx((2**0.5 - 1, 2**0.5 - 1))
    # Same in 1 of 2, and in 2 of 2: means 0.5 and 1, whose error is half of their distance.
    assert found.same_top == 0.75
    assert found.same_top_stderr == pytest.approx(0.25)
    # 0.75 ± 12.7 · 0.25, as far as a share reaches.
    assert found.same_top_interval == (0.0, 1.0)
    own = math.log(2) * np.array([1.0, 2.0, 3.0, 0.0])
    assert found.perplexity_stderr == pytest.approx(2**1.5 * own.std(ddof=1) / 2)
    # Changes of probability 0, -1/4 and -3/8, 1/2; squares 0, 4/64 and 9/64, 16/64.
    assert found.probability_change.value == pytest.approx(-1 / 32)
    assert found.probability_change.stderr == pytest.approx((1 / 8 + 1 / 16) / 2)
    assert found.probability_rms.value == pytest.approx(math.sqrt(29 / 256))
    assert found.probability_rms.stderr == pytest.approx((25 / 128 - 4 / 128) / 2 / (2 * math.sqrt(29 / 256)))


MATRICES = arrays(np.float64, (3, 7), elements=st.floats(-30, 0))


@settings(max_examples=60, deadline=None)
@given(ours=MATRICES, theirs=MATRICES)
def test_against_the_formulas(ours: Floats, theirs: Floats) -> None:
    found = compare(scores(ours), scores(theirs))
    assert found.perplexity == pytest.approx(math.exp(-ours.mean()))
    assert found.reference_perplexity == pytest.approx(math.exp(-theirs.mean()))
    assert found.delta == pytest.approx(math.exp(theirs.mean() - ours.mean()) - 1, rel=1e-6, abs=1e-9)
    assert found.delta_log == pytest.approx((theirs - ours).mean(), rel=1e-9, abs=1e-9)
    error = (theirs - ours).mean(axis=1).std(ddof=1) / math.sqrt(3)
    assert found.delta_stderr == pytest.approx(error, rel=1e-9, abs=1e-9)
    # 4.302652730: the 97.5 % quantile of Student's t with two degrees of freedom.
    ends = found.delta_log - 4.302652730 * error, found.delta_log + 4.302652730 * error
    assert found.delta_log_interval == pytest.approx(ends, rel=1e-5, abs=1e-6)
    assert found.delta_interval == pytest.approx([math.exp(end) - 1 for end in found.delta_log_interval or ()])
    assert found.perplexity_stderr == pytest.approx(
        found.perplexity * ours.std(ddof=1) / math.sqrt(21), rel=1e-9, abs=1e-9
    )
    change = np.exp(ours) - np.exp(theirs)
    assert found.probability_change.value == pytest.approx(change.mean(), abs=1e-12)
    assert found.probability_rms.value == pytest.approx(math.sqrt((change**2).mean()), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(values=MATRICES)
def test_a_model_against_itself(values: Floats) -> None:
    found = compare(scores(values), scores(values))
    assert (found.delta, found.delta_log, found.delta_stderr, found.same_top) == (0.0, 0.0, 0.0, 1.0)
    assert found.delta_interval == (0.0, 0.0)
    assert found.probability_change == found.probability_rms == Estimate(0.0, 0.0)


def test_the_paired_error_is_the_spread_of_repeated_measurements() -> None:
    """Draw many evaluation sets: the spread of the measured difference is the error that each of them reports."""
    generator = np.random.default_rng(0)
    measured, squares, unpaired = [], [], []
    for _ in range(400):
        reference = -generator.gamma(1.0, 2.0, (8, 255))
        # Half of the difference's spread is the window's.
        common = generator.normal(0, 0.1 / math.sqrt(255), (8, 1))
        artifact = reference - 0.02 + common + generator.normal(0, 0.1, (8, 255))
        found = compare(scores(artifact), scores(reference))
        assert found.delta_stderr is not None
        measured.append(found.delta_log)
        squares.append(found.delta_stderr**2)
        unpaired.append(found.perplexity_stderr / found.perplexity)
    assert np.mean(measured) == pytest.approx(0.02, abs=1e-3)
    assert np.var(measured) == pytest.approx(np.mean(squares), rel=0.2)
    # The unpaired error of either perplexity would hide the difference.
    assert np.mean(unpaired) > 10 * math.sqrt(np.mean(squares))


def test_a_spread_by_hand() -> None:
    values = np.arange(1000, dtype=np.float64).reshape(4, 250)
    found = spread(values)
    assert (found.mean, found.median, found.largest) == (499.5, 499.5, 999.0)
    # Linear between the values: 0.9 · 999 and so on.
    assert (found.p90, found.p95, found.p99) == pytest.approx((899.1, 949.05, 989.01))
    # Means 124.5, 374.5, 624.5, 874.5.
    assert found.stderr == pytest.approx(np.std([0, 250, 500, 750], ddof=1) / 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        spread(np.array([[0.1, value]]))


def test_each_divergence_has_a_field_of_its_own() -> None:
    values = scores(np.full((2, 3), -1.0))
    one, two = np.full((2, 3), 0.1), np.full((2, 3), 0.2)
    full = compare(values, values, Divergences(kl=one, jensen_shannon=two))
    assert full.divergence is not None
    assert full.jensen_shannon is not None
    assert (full.divergence.mean, full.jensen_shannon.mean) == pytest.approx((0.1, 0.2))
    assert full.top_k_divergence is None
    coarse = compare(values, values, Divergences(top_k=one, k=20))
    assert coarse.top_k_divergence is not None
    assert coarse.top_k_divergence.k == 20
    assert coarse.top_k_divergence.mean == pytest.approx(0.1)
    assert coarse.divergence is coarse.jensen_shannon is None


def test_a_profile_by_hand() -> None:
    theirs = np.array([[0.05, 0.95, 1.0], [0.5, 0.0, 0.31]])
    ours = np.array([[0.15, 0.95, 0.0], [0.5, 0.0, 0.29]])
    kl = np.array([[0.0, 0.2, 0.4], [0.1, 0.3, 0.5]])
    found = profile(ours, theirs, kl)
    filled = {(r, c): n for r, row in enumerate(found.probability) for c, n in enumerate(row) if n}
    assert filled == {(0, 1): 1, (9, 9): 1, (9, 0): 1, (5, 5): 1, (0, 0): 1, (3, 2): 1}
    assert found.kl_along_window is not None
    assert [first for first, _ in found.kl_along_window] == [0, 1, 2]
    assert [mean for _, mean in found.kl_along_window] == pytest.approx([0.05, 0.25, 0.45])
    assert found.kl_quantiles is not None
    values = dict(found.kl_quantiles)
    assert (values[0.0], values[0.5], values[1.0]) == pytest.approx((0.0, 0.25, 0.5))


def test_a_profile_of_a_long_window_is_of_sixteen_runs() -> None:
    kl = np.tile(np.arange(255.0), (2, 1))
    along = profile(np.ones((2, 255)), np.ones((2, 255)), kl).kl_along_window
    assert along is not None
    assert len(along) == 16
    assert [first for first, _ in along] == [16 * run for run in range(16)]
    # The last run is one position shorter: 240 … 254.
    assert (along[0][1], along[-1][1]) == (7.5, 247.0)


def test_a_profile_without_divergences_has_the_probabilities() -> None:
    values = scores([[math.log(0.25), math.log(0.75)]])
    found = compare(values, values).profile
    assert found is not None
    assert found.kl_quantiles is found.kl_along_window is None
    assert (found.probability[2][2], found.probability[7][7]) == (1, 1)


def test_same_top_counts_tokens() -> None:
    values = np.full((2, 50), -1.0)
    tops = np.arange(100).reshape(2, 50)
    other = tops.copy()
    other[1, :7] += 1
    assert compare(scores(values, tops), scores(values, other)).same_top == pytest.approx(0.93)


def test_the_interval_of_a_share_stays_a_share() -> None:
    """Of two windows, one of which agrees everywhere: 0.95 ± 12.7 · 0.05."""
    reference = scores(np.zeros((2, 10)), np.zeros((2, 10)))
    tops = np.zeros((2, 10))
    tops[1, 3] = 1
    found = compare(scores(np.zeros((2, 10)), tops), reference)
    assert found.same_top_interval is not None
    assert found.same_top_interval == pytest.approx((0.95 - 12.7062047 * 0.05, 1.0))
    (reason,) = [one.reason() for one in judge("runtime", found, Gate(1.0, 0.9)).checks if one.name == "same_top"]
    assert "its 95 % interval is 31.5% to 100.0%" in reason
    tops = 1 - tops
    few = compare(scores(np.zeros((2, 10)), tops), reference)
    assert few.same_top_interval == pytest.approx((0.0, 0.05 + 12.7062047 * 0.05))


def test_one_window_has_no_paired_error_and_no_interval() -> None:
    found = compare(scores([[-1.0]]), scores([[-2.0]]))
    assert found.delta_stderr is None
    assert found.delta_interval is None
    assert found.delta_log_interval is None
    assert found.same_top_stderr is None
    assert found.probability_rms.stderr is None
    assert found.perplexity == pytest.approx(math.e)
    assert found.perplexity_stderr == 0.0


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) against \(1, 3\)"):
        compare(scores([[-1.0, -1.0]]), scores([[-1.0, -1.0, -1.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoilt", ["artifact", "reference"])
def test_a_score_that_is_not_finite_is_an_error(value: float, spoilt: str) -> None:
    good, bad = scores([[-1.0, -2.0]]), scores([[-1.0, value]])
    with pytest.raises(ValueError, match="not finite"):
        compare(*((bad, good) if spoilt == "artifact" else (good, bad)))


def test_a_perplexity_beyond_every_float_fails_the_gate() -> None:
    """A ruined artifact may give the right tokens e^-800: far from the reference, and no reason for a traceback."""
    found = compare(scores([[-800.0, -900.0]]), scores([[-1.0, -2.0]]))
    assert not judge("x", found, FALLBACK_GATE).passed
    assert found.delta_log == pytest.approx(848.5)
    wide = compare(scores([[-800.0], [-9000.0]]), scores([[-1.0], [-2.0]])).delta_interval
    assert wide is not None
    assert np.isfinite(wide).all()
    assert wide[0] == -1.0
