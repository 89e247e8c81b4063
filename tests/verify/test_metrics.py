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

from exporter.runtimes.base import TokenScores
from exporter.verify.gate import FALLBACK_GATE, judge
from exporter.verify.metrics import compare

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
    assert found.same_top == 0.75
    differences = math.log(2) * np.array([0.0, 1.0, 2.0, -1.0])
    assert found.delta_stderr == pytest.approx(differences.std(ddof=1) / 2)
    own = math.log(2) * np.array([1.0, 2.0, 3.0, 0.0])
    assert found.perplexity_stderr == pytest.approx(2**1.5 * own.std(ddof=1) / 2)


MATRICES = arrays(np.float64, (3, 7), elements=st.floats(-30, 0))


@settings(max_examples=60, deadline=None)
@given(ours=MATRICES, theirs=MATRICES)
def test_against_the_formulas(ours: Floats, theirs: Floats) -> None:
    found = compare(scores(ours), scores(theirs))
    assert found.perplexity == pytest.approx(math.exp(-ours.mean()))
    assert found.reference_perplexity == pytest.approx(math.exp(-theirs.mean()))
    assert found.delta == pytest.approx(math.exp(theirs.mean() - ours.mean()) - 1, rel=1e-6, abs=1e-9)
    assert found.delta_log == pytest.approx((theirs - ours).mean(), rel=1e-9, abs=1e-9)
    assert found.delta_stderr == pytest.approx((theirs - ours).std(ddof=1) / math.sqrt(21), rel=1e-9, abs=1e-9)
    assert found.perplexity_stderr == pytest.approx(
        found.perplexity * ours.std(ddof=1) / math.sqrt(21), rel=1e-9, abs=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(values=MATRICES)
def test_a_model_against_itself(values: Floats) -> None:
    found = compare(scores(values), scores(values))
    assert (found.delta, found.delta_log, found.delta_stderr, found.same_top) == (0.0, 0.0, 0.0, 1.0)


def test_the_paired_error_is_the_spread_of_repeated_measurements() -> None:
    """Draw many evaluation sets: the spread of the measured difference is the error that each of them reports."""
    generator = np.random.default_rng(0)
    measured, reported, unpaired = [], [], []
    for _ in range(400):
        reference = -generator.gamma(1.0, 2.0, (4, 255))
        artifact = reference - 0.02 + generator.normal(0, 0.1, (4, 255))
        found = compare(scores(artifact), scores(reference))
        measured.append(found.delta_log)
        reported.append(found.delta_stderr)
        unpaired.append(found.perplexity_stderr / found.perplexity)
    assert np.mean(measured) == pytest.approx(0.02, abs=1e-3)
    assert np.std(measured) == pytest.approx(np.mean(reported), rel=0.1)
    # The unpaired error of either perplexity would hide the difference.
    assert np.mean(unpaired) > 10 * np.mean(reported)
    assert np.mean(np.abs(np.array(measured) - 0.02) < 2 * np.array(reported)) == pytest.approx(0.954, abs=0.03)


def test_same_top_counts_tokens() -> None:
    values = np.full((2, 50), -1.0)
    tops = np.arange(100).reshape(2, 50)
    other = tops.copy()
    other[1, :7] += 1
    assert compare(scores(values, tops), scores(values, other)).same_top == pytest.approx(0.93)


def test_a_single_token_has_no_error() -> None:
    found = compare(scores([[-1.0]]), scores([[-2.0]]))
    assert found.delta_stderr == 0.0
    assert found.perplexity == pytest.approx(math.e)


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
