"""Divergences from logits: against the formulas in float64, and the top-k form as the lower bound that it is."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exporter.runtimes import base
from exporter.runtimes.base import TokenScores, TopK, TopKScores
from exporter.verify.scores.divergence import Divergence, divergences, top_k_divergences
from tests.predictions import log_softmax, reference_of, top_of

Floats = npt.NDArray[np.float64]
VOCABULARY = 24


def kl_by_definition(expected: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> Floats:
    p, q = log_softmax(expected), log_softmax(found)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def js_by_definition(expected: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> Floats:
    p, q = np.exp(log_softmax(expected)), np.exp(log_softmax(found))
    middle = (p + q) / 2
    # Where the middle is no number above zero, neither are p and q.
    parts = [np.where(x > 0, x * np.log2(np.where(x > 0, x / np.where(middle > 0, middle, 1), 1)), 0) for x in (p, q)]
    return np.asarray((parts[0] + parts[1]).sum(axis=-1) / 2)


def pair(seed: int, shape: tuple[int, ...], noise: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    expected = 3 * generator.standard_normal(shape)
    return expected.astype(np.float32), (expected + noise * generator.standard_normal(shape)).astype(np.float32)


# --- the full form -------------------------------------------------------------------------------------------------

LOGITS = arrays(np.float32, (4, VOCABULARY), elements=st.floats(-60, 60, width=32))


@settings(max_examples=100, deadline=None)
@given(expected=LOGITS, found=LOGITS)
def test_against_the_definitions(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> None:
    kl, js = divergences(torch.from_numpy(expected), torch.from_numpy(found))
    assert kl.numpy() == pytest.approx(kl_by_definition(expected, found), rel=1e-5, abs=1e-6)
    assert js.numpy() == pytest.approx(js_by_definition(expected, found), rel=1e-5, abs=1e-6)
    assert (kl >= 0).all()
    assert ((js >= 0) & (js <= 1)).all()


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1, 1.0])
def test_small_divergences_are_not_lost_in_rounding(noise: float) -> None:
    """A vocabulary of a real size; at a noise of 1e-3 the divergence is 5e-7, and sum p d in float32 is off by more."""
    expected, found = pair(0, (6, 151_936), noise)
    kl, js = divergences(torch.from_numpy(expected), torch.from_numpy(found))
    exact = kl_by_definition(expected, found)
    assert kl.numpy() == pytest.approx(exact, rel=0.01, abs=5e-8)
    assert js.numpy() == pytest.approx(js_by_definition(expected, found), rel=0.01, abs=5e-8)


def test_equal_predictions_have_none_and_opposite_ones_the_most() -> None:
    equal = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for found in divergences(equal, equal + 7):
        assert found.numpy() == pytest.approx(0, abs=2e-7)
    kl, js = divergences(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    assert (kl.item(), js.item()) == pytest.approx((200.0, 1.0), rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_logit_that_is_not_finite_gives_no_finite_divergence(value: float) -> None:
    found = torch.zeros(1, 5)
    found[0, 2] = value
    kl, _ = divergences(torch.zeros(1, 5), found)
    assert not kl.isfinite().all()


def test_windows_are_taken_by_their_numbers_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # More positions than the reference gives logits of at a time, and more of these than a block holds.
    expected, found = pair(1, (2, 300, VOCABULARY), 0.3)
    monkeypatch.setattr(base, "BLOCK_BYTES", 7 * VOCABULARY * 4)
    divergence = Divergence(reference_of(expected))
    for window in (1, 0):
        divergence.take(window, torch.from_numpy(found[window]))
    taken = divergence.found(TokenScores(np.zeros((2, 300)), np.zeros((2, 300), np.int64)))
    assert taken.kl == pytest.approx(kl_by_definition(expected, found), rel=1e-4, abs=1e-6)
    assert taken.jensen_shannon == pytest.approx(js_by_definition(expected, found), rel=1e-4, abs=1e-6)
    assert taken.top_k is None


@pytest.mark.parametrize("size", [VOCABULARY - 5, VOCABULARY + 5])
def test_vocabularies_of_two_sizes_are_compared_over_what_they_share(size: int) -> None:
    expected, found = pair(2, (1, 9, VOCABULARY + 5), 0.3)
    divergence = Divergence(reference_of(np.ascontiguousarray(expected[..., :VOCABULARY])))
    divergence.take(0, torch.from_numpy(found[0, :, :size]))
    taken = divergence.found(TokenScores(np.zeros((1, 9)), np.zeros((1, 9), np.int64)))
    shared = min(size, VOCABULARY)
    exact = kl_by_definition(expected[..., :shared], found[..., :shared])
    assert taken.kl == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_logits_of_some_windows_alone_are_an_error() -> None:
    expected, found = pair(3, (2, 9, VOCABULARY), 0.3)
    divergence = Divergence(reference_of(expected))
    divergence.take(1, torch.from_numpy(found[1]))
    with pytest.raises(ValueError, match="1 of 2"):
        divergence.found(TokenScores(np.zeros((2, 9)), np.zeros((2, 9), np.int64)))


# --- the top-k form ------------------------------------------------------------------------------------------------

WINDOWS = arrays(np.float32, (1, 4, VOCABULARY), elements=st.floats(-40, 40, width=32))
# What the sums over float32 log-probabilities may be off by.
RESOLUTION = 3e-6


@settings(max_examples=100, deadline=None)
@given(expected=WINDOWS, found=WINDOWS, k=st.integers(1, VOCABULARY))
def test_the_top_k_form_is_a_lower_bound(
    expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32], k: int
) -> None:
    coarse = top_k_divergences(reference_of(expected), top_of(found, k))
    full = kl_by_definition(expected, found)
    assert (coarse <= full * (1 + RESOLUTION) + RESOLUTION).all()
    assert (coarse >= 0).all()


@settings(max_examples=100, deadline=None)
@given(expected=WINDOWS, found=WINDOWS)
def test_with_the_whole_vocabulary_it_is_the_full_form(
    expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]
) -> None:
    whole = top_k_divergences(reference_of(expected), top_of(found, VOCABULARY))
    assert whole == pytest.approx(kl_by_definition(expected, found), rel=RESOLUTION, abs=RESOLUTION)


def test_it_grows_with_k() -> None:
    expected, found = pair(4, (2, 70, VOCABULARY), 1.0)
    reference = reference_of(expected)
    means = [top_k_divergences(reference, top_of(found, k)).mean() for k in (1, 5, 10, VOCABULARY)]
    assert means == sorted(means)
    assert means[0] < 0.7 * means[-1]


def test_two_tokens_and_the_rest_by_hand() -> None:
    reference = reference_of(np.log(np.array([[[0.5, 0.25, 0.125, 0.125]]], np.float32)))
    top = TopK(np.array([[[2, 0]]]), np.log(np.array([[[0.5, 0.25]]])))
    expected = 0.125 * math.log(0.125 / 0.5) + 0.5 * math.log(0.5 / 0.25) + 0.375 * math.log(0.375 / 0.25)
    assert top_k_divergences(reference, top)[0, 0] == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("other", [1, VOCABULARY + 3], ids=["of no probability", "that the reference lacks"])
def test_a_token_without_a_counterpart_counts_with_the_rest(other: int) -> None:
    reference = reference_of(np.zeros((1, 1, VOCABULARY), np.float32))
    value = -math.inf if other == 1 else math.log(0.2)
    top = TopK(np.array([[[0, other]]]), np.array([[[math.log(0.5), value]]]))
    p = 1 / VOCABULARY
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert top_k_divergences(reference, top)[0, 0] == pytest.approx(expected, abs=3e-6)


def test_scores_with_the_likeliest_tokens_alone_give_the_top_k_form_alone() -> None:
    expected, found = pair(5, (2, 9, VOCABULARY), 0.5)
    top = top_of(found, 6)
    taken = Divergence(reference_of(expected)).found(TopKScores(np.zeros((2, 9)), top.ids[:, :, 0], top))
    assert taken.kl is taken.jensen_shannon is None
    assert (taken.k, taken.top_k is not None) == (6, True)
    assert Divergence(reference_of(expected)).found(TokenScores(np.zeros((2, 9)), top.ids[:, :, 0])).top_k is None
