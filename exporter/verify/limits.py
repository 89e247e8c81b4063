"""The gate's limits by format and type; docs/quality.md has the measurements that the defaults rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from exporter.backends.gptq.names import GROUP_SIZES, quant_name
from exporter.errors import RecipeError
from exporter.recipe import Limits


@dataclass(frozen=True)
class Gate:
    """Limits that an artifact must keep.

    Attributes:
        max_delta: largest relative change of perplexity, up or down: a model that got better by as much is not the
            model that was trained either.
        min_same_top: smallest share of predictions with the reference's likeliest token.
        max_divergence: largest mean KL divergence from the reference in nats, whatever form the runtime gives it in.
    """

    max_delta: float
    min_same_top: float
    max_divergence: float = math.inf


# Defaults; docs/quality.md has the measurements that they rest on.
DEFAULT_GATES: Mapping[str, Gate] = {
    "gguf F32": Gate(0.002, 0.98, 0.001),
    "gguf F16": Gate(0.003, 0.97, 0.001),
    "gguf BF16": Gate(0.005, 0.96, 0.002),
    "gguf Q8_0": Gate(0.010, 0.95, 0.004),
    "gguf Q6_K": Gate(0.020, 0.93, 0.01),
    "gguf Q5_K_M": Gate(0.030, 0.90, 0.03),
    "gguf Q5_K_S": Gate(0.030, 0.90, 0.04),
    "gguf Q5_1": Gate(0.040, 0.90, 0.04),
    "gguf Q5_0": Gate(0.040, 0.86, 0.1),
    "gguf Q4_K_M": Gate(0.080, 0.85, 0.12),
    "gguf Q4_K_S": Gate(0.080, 0.85, 0.12),
    "gguf IQ4_NL": Gate(0.120, 0.84, 0.12),
    "gguf IQ4_XS": Gate(0.120, 0.84, 0.12),
    "gguf Q4_1": Gate(0.150, 0.80, 0.15),
    "gguf Q4_0": Gate(0.400, 0.72, 0.45),
    "gguf Q3_K_L": Gate(0.250, 0.75, 0.25),
    "gguf Q3_K_M": Gate(0.300, 0.70, 0.25),
    "gguf Q3_K_S": Gate(0.500, 0.65, 0.45),
    "gguf IQ3_M": Gate(0.300, 0.75, 0.25),
    "gguf IQ3_S": Gate(0.300, 0.72, 0.3),
    "gguf IQ3_XS": Gate(0.400, 0.70, 0.35),
    "gguf IQ3_XXS": Gate(0.500, 0.65, 0.6),
    "gguf Q2_K": Gate(1.000, 0.50, 0.45),
    "gguf Q2_K_S": Gate(1.000, 0.50, 1.0),
    "gguf IQ2_M": Gate(1.000, 0.50, 0.8),
    "gguf IQ2_S": Gate(1.000, 0.50, 1.0),
    "gguf IQ2_XS": Gate(1.000, 0.50, 1.2),
    "gguf IQ2_XXS": Gate(1.000, 0.45, 1.8),
    "gguf IQ1_M": Gate(1.000, 0.40, 2.5),
    "gguf IQ1_S": Gate(1.000, 0.40, 3.0),
    "safetensors fp32": Gate(0.001, 0.99, 0.0005),
    "safetensors fp16": Gate(0.003, 0.97, 0.001),
    "safetensors bf16": Gate(0.010, 0.95, 0.004),
} | {
    # Smaller groups lose less, and are held to the limit of the largest.
    f"{backend} {quant_name(bits, group)}": gate
    for backend in ("gptq", "gptqmodel")
    for bits, gate in (
        (8, Gate(0.010, 0.95, 0.004)),
        (4, Gate(0.150, 0.80, 0.15)),
        (3, Gate(0.600, 0.60, 0.45)),
        (2, Gate(1.000, 0.50, 2.0)),
    )
    for group in GROUP_SIZES
}
# For formats of other packages, until they say better with --gate.
FALLBACK_GATE = Gate(0.10, 0.85, 0.10)


def gate_for(label: str, quant: str, overrides: Mapping[str, float | Limits]) -> Gate:
    """The gate of an artifact.

    Args:
        label: format and type, for example `gguf Q4_K_M`.
        quant: the type alone.
        overrides: by type, in any case, or by `*`: a number is the largest change of perplexity, and the only limit
            then; `Limits` replace those that they name. Those of the type come on top of those of `*`.
    """
    gate = DEFAULT_GATES.get(label, FALLBACK_GATE)
    by_type = {key.lower(): limit for key, limit in overrides.items()}
    for key in ("*", quant.lower()):
        if key in by_type:
            gate = _replaced(gate, by_type[key])
    return gate


def check_types(overrides: Mapping[str, float | Limits], quants: Sequence[str]) -> None:
    """Each limit must be one of a type that is there: one that is silently not applied is no limit.

    Args:
        overrides: as of `gate_for`.
        quants: the types of all artifacts.

    Raises:
        RecipeError: one is not.
    """
    there = {quant.lower() for quant in quants}
    if unknown := [key for key in overrides if key != "*" and key.lower() not in there]:
        raise RecipeError(
            f"evaluation.gate.{unknown[0]}",
            found="a limit of a type that is not made",
            expected="* or one of " + " ".join(dict.fromkeys(quants)),
            remedy="Correct the name of the type.",
        )


def _replaced(gate: Gate, limit: float | Limits) -> Gate:
    if not isinstance(limit, Limits):
        return Gate(limit, 0.0)
    names = {"change": "max_delta", "kl": "max_divergence", "same_top": "min_same_top"}
    given = {names[key]: value for key, value in limit.model_dump(exclude_none=True).items()}
    return replace(gate, **given)
