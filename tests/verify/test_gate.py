"""The gate: which limits apply, and what breaks them."""

from __future__ import annotations

import math

import pytest

from exporter.backends.registry import backend_names, load_backend
from exporter.verify.gate import DEFAULT_GATES, FALLBACK_GATE, Gate, gate_for, judge
from exporter.verify.metrics import Comparison, Estimate
from exporter.verify.weights import WeightsResult

GATE = Gate(max_delta=0.05, min_same_top=0.9)


def comparison(delta: float = 0.0, same_top: float = 1.0) -> Comparison:
    return Comparison(
        tokens_scored=2040,
        perplexity=10.0 * (1 + delta),
        perplexity_stderr=0.1,
        reference_perplexity=10.0,
        delta=delta,
        delta_interval=None,
        delta_log=math.log1p(delta) if delta > -1 else math.nan,
        delta_stderr=0.001,
        delta_log_interval=None,
        same_top=same_top,
        same_top_stderr=None,
        probability_change=Estimate(0.0, None),
        probability_rms=Estimate(0.0, None),
    )


@pytest.mark.parametrize(
    ("delta", "same_top", "broken"),
    [
        (0.0, 1.0, []),
        (0.05, 0.9, []),
        (-0.05, 0.9, []),
        (0.0501, 1.0, ["perplexity"]),
        # A model that got better by as much is not the one that was trained either.
        (-0.0501, 1.0, ["perplexity"]),
        (0.0, 0.8999, ["same top"]),
        (0.5, 0.1, ["perplexity", "same top"]),
        (math.inf, 1.0, ["perplexity"]),
        (math.nan, 1.0, ["perplexity"]),
    ],
)
def test_limits(delta: float, same_top: float, broken: list[str]) -> None:
    verdict = judge("llama.cpp 1", comparison(delta, same_top), GATE)
    assert len(verdict.broken) == len(broken)
    assert all(words in text for words, text in zip(broken, verdict.broken, strict=True))
    assert verdict.passed == (not broken)
    assert verdict.runtime == "llama.cpp 1"
    assert verdict.gate == GATE


def test_what_is_wrong_with_the_weights_breaks_the_verdict() -> None:
    weights = WeightsResult((), ("a is missing",))
    verdict = judge("x", comparison(0.5), GATE, weights)
    assert not verdict.passed
    assert verdict.broken[0] == "a is missing"
    assert len(verdict.broken) == 2
    assert verdict.weights is weights
    assert judge("x", comparison(), GATE, WeightsResult((), ())).passed


def test_a_broken_limit_names_figure_and_limit() -> None:
    verdict = judge("x", comparison(0.1234, 0.5), GATE)
    assert "+12.34%" in verdict.broken[0]
    assert "±5.00%" in verdict.broken[0]
    assert "50.0%" in verdict.broken[1]
    assert "90.0%" in verdict.broken[1]


def test_every_type_of_every_backend_has_limits_of_its_own() -> None:
    names = ("gguf", "gptq", "gptqmodel", "safetensors")
    labels = {f"{name} {quant}" for name in names for quant in load_backend(name).quants}
    assert set(names) <= set(backend_names())
    assert labels == DEFAULT_GATES.keys()
    for gate in DEFAULT_GATES.values():
        assert 0 < gate.max_delta <= 1
        assert 0.4 <= gate.min_same_top < 1


def test_a_wider_type_is_held_to_a_stricter_limit() -> None:
    order = ["F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    gates = [DEFAULT_GATES[f"gguf {name}"] for name in order]
    assert [gate.max_delta for gate in gates] == sorted(gate.max_delta for gate in gates)
    assert [gate.min_same_top for gate in gates] == sorted((gate.min_same_top for gate in gates), reverse=True)


def test_defaults_and_fallback() -> None:
    assert gate_for("gguf Q4_K_M", "Q4_K_M", {}) == DEFAULT_GATES["gguf Q4_K_M"]
    assert gate_for("marshmallow Q4_K_M", "Q4_K_M", {}) == FALLBACK_GATE
    assert gate_for("gguf Q4_K_M", "Q4_K_M", {"Q8_0": 0.5}) == DEFAULT_GATES["gguf Q4_K_M"]


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [({"Q4_K_M": 0.02}, 0.02), ({"*": 0.3}, 0.3), ({"*": 0.3, "Q4_K_M": 0.02}, 0.02), ({"Q4_K_M": 0.0}, 0.0)],
)
def test_overrides(overrides: dict[str, float], limit: float) -> None:
    gate = gate_for("gguf Q4_K_M", "Q4_K_M", overrides)
    assert gate.max_delta == limit
    assert judge("x", comparison(limit, 0.01), gate).passed
    assert not judge("x", comparison(limit + 1e-6, 1.0), gate).passed


def test_a_type_of_an_override_may_be_given_in_small_letters() -> None:
    """As in --quant: a limit that is silently not applied is no limit."""
    assert gate_for("gguf Q4_K_M", "Q4_K_M", {"q4_k_m": 0.02}).max_delta == 0.02
