"""The gate: limits by format and type, and a verdict that can fail the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.backends.gptq.names import GROUP_SIZES, quant_name
from exporter.verify.metrics import Comparison
from exporter.verify.weights import WeightsResult

if TYPE_CHECKING:
    from exporter.verify.answers.judge import Answers


@dataclass(frozen=True)
class Gate:
    """Limits that an artifact must keep.

    Attributes:
        max_delta: largest relative change of perplexity, up or down: a model that got better by as much is not the
            model that was trained either.
        min_same_top: smallest share of predictions with the reference's likeliest token.
    """

    max_delta: float
    min_same_top: float


# Defaults; docs/quality.md has the measurements that they rest on.
DEFAULT_GATES: Mapping[str, Gate] = {
    "gguf F32": Gate(0.002, 0.98),
    "gguf F16": Gate(0.003, 0.97),
    "gguf BF16": Gate(0.005, 0.96),
    "gguf Q8_0": Gate(0.010, 0.95),
    "gguf Q6_K": Gate(0.020, 0.93),
    "gguf Q5_K_M": Gate(0.030, 0.90),
    "gguf Q5_K_S": Gate(0.030, 0.90),
    "gguf Q5_1": Gate(0.040, 0.90),
    "gguf Q5_0": Gate(0.040, 0.86),
    "gguf Q4_K_M": Gate(0.080, 0.85),
    "gguf Q4_K_S": Gate(0.080, 0.85),
    "gguf IQ4_NL": Gate(0.120, 0.84),
    "gguf IQ4_XS": Gate(0.120, 0.84),
    "gguf Q4_1": Gate(0.150, 0.80),
    "gguf Q4_0": Gate(0.400, 0.72),
    "gguf Q3_K_L": Gate(0.250, 0.75),
    "gguf Q3_K_M": Gate(0.300, 0.70),
    "gguf Q3_K_S": Gate(0.500, 0.65),
    "gguf IQ3_M": Gate(0.300, 0.75),
    "gguf IQ3_S": Gate(0.300, 0.72),
    "gguf IQ3_XS": Gate(0.400, 0.70),
    "gguf IQ3_XXS": Gate(0.500, 0.65),
    "gguf Q2_K": Gate(1.000, 0.50),
    "gguf Q2_K_S": Gate(1.000, 0.50),
    "gguf IQ2_M": Gate(1.000, 0.50),
    "gguf IQ2_S": Gate(1.000, 0.50),
    "gguf IQ2_XS": Gate(1.000, 0.50),
    "gguf IQ2_XXS": Gate(1.000, 0.45),
    "gguf IQ1_M": Gate(1.000, 0.40),
    "gguf IQ1_S": Gate(1.000, 0.40),
    "safetensors fp32": Gate(0.001, 0.99),
    "safetensors fp16": Gate(0.003, 0.97),
    "safetensors bf16": Gate(0.010, 0.95),
} | {
    # Smaller groups lose less, and are held to the limit of the largest.
    f"{backend} {quant_name(bits, group)}": gate
    for backend in ("gptq", "gptqmodel")
    for bits, gate in ((8, Gate(0.010, 0.95)), (4, Gate(0.150, 0.80)), (3, Gate(0.600, 0.60)), (2, Gate(1.000, 0.50)))
    for group in GROUP_SIZES
}
# For formats of other packages, until they say better with --gate.
FALLBACK_GATE = Gate(0.10, 0.85)


def gate_for(label: str, quant: str, overrides: Mapping[str, float]) -> Gate:
    """The gate of an artifact.

    Args:
        label: format and type, for example `gguf Q4_K_M`.
        quant: the type alone.
        overrides: largest delta by type, in any case, or by `*`; it replaces the limit on the top token too.
    """
    by_type = {key.lower(): limit for key, limit in overrides.items()}
    for key in (quant.lower(), "*"):
        if key in by_type:
            return Gate(by_type[key], 0.0)
    return DEFAULT_GATES.get(label, FALLBACK_GATE)


@dataclass(frozen=True)
class Verification:
    """The verdict on one artifact.

    Attributes:
        runtime: what scored it, with its version.
        comparison: its scores against the reference's.
        gate: the limits.
        broken: the limits that it breaks; empty if it passed.
        answers: what it answered, None if it was not asked; faults in it are among what is broken.
        weights: what is in its stored weights; None if they cannot be read back.
    """

    runtime: str
    comparison: Comparison
    gate: Gate
    broken: tuple[str, ...]
    answers: Answers | None = None
    weights: WeightsResult | None = None

    @property
    def passed(self) -> bool:
        """Whether no limit is broken."""
        return not self.broken


def judge(runtime: str, comparison: Comparison, gate: Gate, weights: WeightsResult | None = None) -> Verification:
    """Hold an artifact's scores in a runtime, and its stored weights, against the limits."""
    broken = list(weights.broken) if weights else []
    if not math.isfinite(comparison.delta) or abs(comparison.delta) > gate.max_delta:
        broken.append(f"perplexity changes by {comparison.delta:+.2%}, the limit is ±{gate.max_delta:.2%}")
    if comparison.same_top < gate.min_same_top:
        broken.append(f"the same top token in {comparison.same_top:.1%}, the limit is {gate.min_same_top:.1%}")
    return Verification(runtime, comparison, gate, tuple(broken), weights=weights)
