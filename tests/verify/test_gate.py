"""The gate: which limits apply, and what breaks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest

from exporter.backends.registry import backend_names, load_backend
from exporter.plan.gate_limits import FALLBACK_GATE, Gate, gate_for
from exporter.recipe import Limits
from exporter.verify.gate import Check, Kind, Verdict, judge
from exporter.verify.scores.metrics import Comparison, Estimate, Spread, TopKSpread
from exporter.verify.weights.check import WeightsResult
from tests.default_gates import DEFAULT_GATES, LARGE_GATES

GATE = Gate(max_delta=0.05, min_same_top=0.9)
SMALL, LARGE = 999_999_999, 1_000_000_000


def comparison(delta: float = 0.0, same_top: float = 1.0) -> Comparison:
    return Comparison(
        tokens_scored=2040,
        perplexity=10.0 * (1 + delta),
        perplexity_stderr=0.1,
        reference_perplexity=10.0,
        delta=delta,
        delta_interval=(delta, delta),
        delta_log=math.log1p(delta) if delta > -1 else math.nan,
        delta_stderr=0.001,
        delta_log_interval=None,
        same_top=same_top,
        same_top_stderr=None,
        same_top_interval=(same_top, same_top),
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
    assert verdict.verdict == ("failed" if broken else "passed")
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
    assert labels == DEFAULT_GATES.keys() == LARGE_GATES.keys()
    for gate in (*DEFAULT_GATES.values(), *LARGE_GATES.values()):
        assert 0 < gate.max_delta <= 2.5
        assert 0 < gate.max_divergence <= 3
        assert 0.4 <= gate.min_same_top < 1


@pytest.mark.parametrize("table", [DEFAULT_GATES, LARGE_GATES], ids=["small", "large"])
def test_a_wider_type_is_held_to_a_stricter_limit(table: Mapping[str, Gate]) -> None:
    order = ["F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    gates = [table[f"gguf {name}"] for name in order]
    assert [gate.max_delta for gate in gates] == sorted(gate.max_delta for gate in gates)
    assert [gate.max_divergence for gate in gates] == sorted(gate.max_divergence for gate in gates)
    assert [gate.min_same_top for gate in gates] == sorted((gate.min_same_top for gate in gates), reverse=True)


def test_a_larger_model_is_held_to_no_wider_limit() -> None:
    for label, small in DEFAULT_GATES.items():
        large = LARGE_GATES[label]
        assert large.max_delta <= small.max_delta, label
        assert large.max_divergence <= small.max_divergence, label
        assert large.max_top_k_divergence <= small.max_top_k_divergence, label
        assert large.min_same_top >= small.min_same_top, label


def test_the_class_is_by_the_parameters_of_the_model() -> None:
    for label, quant in (("gguf Q4_0", "Q4_0"), ("gptq gptq-int4-g128", "gptq-int4-g128")):
        small, large = (gate_for(label, quant, {}, parameters) for parameters in (SMALL, LARGE))
        assert (small, large) == (DEFAULT_GATES[label], LARGE_GATES[label])
        assert (small.size_class, large.size_class) == ("below_1b", "from_1b")
        assert large.max_delta < small.max_delta


def test_a_large_model_that_lost_what_a_small_one_may_lose_fails() -> None:
    """A third of the perplexity by Q4_0 is within what half a billion parameters lose; published for 8 B: 7.5 %."""
    found = comparison(0.35)
    assert judge("x", found, gate_for("gguf Q4_0", "Q4_0", {}, 494_000_000)).passed
    assert not judge("x", found, gate_for("gguf Q4_0", "Q4_0", {}, 8_030_000_000)).passed


def test_limits_that_were_given_win_whatever_the_size() -> None:
    for overrides in ({"*": 0.7}, {"Q4_0": 0.7}, {"Q4_0": Limits(change=0.7)}):
        gate = gate_for("gguf Q4_0", "Q4_0", overrides, LARGE)
        assert (gate.max_delta, gate.size_class) == (0.7, "from_1b")
    assert gate_for("marshmallow x", "x", {}, LARGE) == dataclasses.replace(FALLBACK_GATE, size_class="from_1b")


# --- the two forms of the KL divergence ----------------------------------------------------------------------------


def far(mean: float) -> Spread:
    return Spread(mean, 0.0, mean, mean, mean, mean, mean, (mean, mean))


def test_each_form_of_the_divergence_has_a_limit_of_its_own() -> None:
    gate = dataclasses.replace(GATE, max_divergence=0.1, max_top_k_divergence=0.02)
    full = dataclasses.replace(comparison(), divergence=far(0.05))
    coarse = dataclasses.replace(comparison(), top_k_divergence=TopKSpread(**vars(far(0.05)), k=20))
    assert judge("x", full, gate).passed
    found = judge("x", coarse, gate)
    assert found.verdict == "failed"
    assert {check.name: check.limit for check in found.checks}["top_k_divergence"] == 0.02
    assert "top-k form" in found.broken[0]
    # Nor does the limit of the top-k form hold for the full one, or the other way round.
    assert judge("x", coarse, dataclasses.replace(gate, max_divergence=0.0, max_top_k_divergence=0.1)).passed
    assert not judge("x", full, dataclasses.replace(gate, max_divergence=0.0, max_top_k_divergence=0.1)).passed


def test_what_vllm_serves_has_a_limit_on_the_top_k_form() -> None:
    """It is a lower bound of the full form, so a limit above the full form's would say nothing."""
    for gates in (DEFAULT_GATES, LARGE_GATES):
        for label, gate in gates.items():
            if label.startswith("gguf "):
                assert math.isinf(gate.max_top_k_divergence)
            else:
                assert 0 < gate.max_top_k_divergence < gate.max_divergence


def test_the_limit_on_the_top_k_form_may_be_given() -> None:
    label, quant = "gptq gptq-int4-g128", "gptq-int4-g128"
    default = DEFAULT_GATES[label]
    found = gate_for(label, quant, {quant: Limits(top_k_kl=0.5)}, SMALL)
    assert found == dataclasses.replace(default, max_top_k_divergence=0.5)
    found = gate_for(label, quant, {quant: Limits(kl=0.5)}, SMALL)
    assert found == dataclasses.replace(default, max_divergence=0.5)
    assert math.isinf(gate_for(label, quant, {quant: 0.5}, SMALL).max_top_k_divergence)


def test_defaults_and_fallback() -> None:
    assert gate_for("gguf Q4_K_M", "Q4_K_M", {}, SMALL) == DEFAULT_GATES["gguf Q4_K_M"]
    assert gate_for("marshmallow Q4_K_M", "Q4_K_M", {}, SMALL) == FALLBACK_GATE
    assert gate_for("gguf Q4_K_M", "Q4_K_M", {"Q8_0": 0.5}, SMALL) == DEFAULT_GATES["gguf Q4_K_M"]


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [({"Q4_K_M": 0.02}, 0.02), ({"*": 0.3}, 0.3), ({"*": 0.3, "Q4_K_M": 0.02}, 0.02), ({"Q4_K_M": 0.0}, 0.0)],
)
def test_overrides(overrides: dict[str, float], limit: float) -> None:
    gate = gate_for("gguf Q4_K_M", "Q4_K_M", overrides, SMALL)
    assert gate.max_delta == limit
    assert judge("x", comparison(limit, 0.01), gate).passed
    assert not judge("x", comparison(limit + 1e-6, 1.0), gate).passed


def test_a_type_of_an_override_may_be_given_in_small_letters() -> None:
    """As in --quant: a limit that is silently not applied is no limit."""
    assert gate_for("gguf Q4_K_M", "Q4_K_M", {"q4_k_m": 0.02}, SMALL).max_delta == 0.02


def test_named_limits_replace_their_own_alone() -> None:
    default = DEFAULT_GATES["gguf Q4_K_M"]
    found = gate_for("gguf Q4_K_M", "Q4_K_M", {"*": Limits(kl=0.5)}, SMALL)
    assert (found.max_delta, found.max_divergence, found.min_same_top) == (default.max_delta, 0.5, default.min_same_top)
    found = gate_for("gguf Q4_K_M", "Q4_K_M", {"Q4_K_M": Limits(change=0.25, same_top=0.0)}, SMALL)
    assert (found.max_delta, found.max_divergence, found.min_same_top) == (0.25, default.max_divergence, 0.0)


def test_limits_of_a_type_come_on_top_of_those_of_all_types() -> None:
    default = DEFAULT_GATES["gguf Q8_0"]
    found = gate_for("gguf Q8_0", "Q8_0", {"q8_0": Limits(change=0.02), "*": Limits(kl=0.1, change=0.5)}, SMALL)
    assert found == Gate(0.02, default.min_same_top, 0.1)
    assert gate_for("gguf Q8_0", "Q8_0", {"*": 0.5, "Q8_0": Limits(kl=0.1)}, SMALL) == Gate(0.5, 0.0, 0.1)
    # A number is the only limit of its type.
    assert gate_for("gguf Q8_0", "Q8_0", {"*": Limits(kl=0.1), "Q8_0": 0.02}, SMALL) == Gate(0.02, 0.0)


@pytest.mark.parametrize(
    ("kind", "interval", "limit", "verdict"),
    [
        ("within", (-0.01, 0.02), 0.02, "passed"),
        ("within", (-0.02, 0.01), 0.02, "passed"),
        ("within", (-0.03, 0.01), 0.02, "undecided"),
        ("within", (0.01, 0.03), 0.02, "undecided"),
        ("within", (0.021, 0.03), 0.02, "failed"),
        ("within", (-0.03, -0.021), 0.02, "failed"),
        ("within", (-0.01, 0.01), 0.0, "undecided"),
        ("at_most", (0.0, 0.1), 0.1, "passed"),
        ("at_most", (0.05, 0.15), 0.1, "undecided"),
        ("at_most", (0.11, 0.15), 0.1, "failed"),
        ("at_least", (0.9, 0.95), 0.9, "passed"),
        ("at_least", (0.85, 0.95), 0.9, "undecided"),
        ("at_least", (0.8, 0.89), 0.9, "failed"),
    ],
)
def test_an_interval_that_straddles_its_limit_is_undecided(
    kind: Kind, interval: tuple[float, float], limit: float, verdict: Verdict
) -> None:
    name = {"within": "perplexity", "at_most": "kl_divergence", "at_least": "same_top"}[kind]
    check = Check(name, sum(interval) / 2, interval, limit, kind)
    assert check.verdict == verdict
    if verdict == "undecided":
        assert "undecided, its 95 % interval is" in check.reason()


def test_one_window_decides_nothing_but_a_limit_that_nothing_can_break() -> None:
    assert Check("perplexity", 0.0, None, 0.5, "within").verdict == "undecided"
    assert "one window" in Check("perplexity", 0.0, None, 0.5, "within").reason()
    assert Check("kl_divergence", 0.0, None, math.inf, "at_most").verdict == "passed"
    assert Check("same_top", 0.5, None, 0.0, "at_least").verdict == "passed"


def test_what_is_undecided_is_not_passed_and_a_fault_is_a_failure() -> None:
    undecided = dataclasses.replace(comparison(0.04), delta_interval=(0.02, 0.06))
    assert judge("x", undecided, GATE).verdict == "undecided"
    assert not judge("x", undecided, GATE).passed
    assert judge("x", undecided, GATE, WeightsResult((), ("a is missing",))).verdict == "failed"
