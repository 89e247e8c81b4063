"""The gate's limits by size of the model, format and type; docs/measurements has what the defaults rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from exporter.backends.gptq.names import GROUP_SIZES, quant_name
from exporter.errors import RecipeError
from exporter.recipe import Limits

# By the number of parameters: a small model loses more by the same type.
SizeClass = Literal["below_1b", "from_1b"]
LARGE = 1_000_000_000


@dataclass(frozen=True)
class Gate:
    """Limits that an artifact must keep.

    Attributes:
        max_delta: largest relative change of perplexity, up or down: a model that got better by as much is not the
            model that was trained either.
        min_same_top: smallest share of predictions with the reference's likeliest token.
        max_divergence: largest mean KL divergence from the reference in nats, over the whole vocabulary.
        max_top_k_divergence: the same for the top-k form, which is a lower bound of the other.
        size_class: the class of models that the limits are meant for.
    """

    max_delta: float
    min_same_top: float
    max_divergence: float = math.inf
    max_top_k_divergence: float = math.inf
    size_class: SizeClass = "below_1b"


# Defaults below 1 B; docs/measurements has the measurements that they rest on.
_MEASURED: Mapping[str, Gate] = {
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
    "gguf Q2_K": Gate(1.000, 0.50, 1.0),
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
        (2, Gate(2.500, 0.50, 2.0)),
    )
    for group in GROUP_SIZES
}
# Limits on the change and on the KL divergence from 1 B on, where published figures allow stricter ones: 2.5 times the
# larger published figure, rounded up to two digits, and no less than 0.5 % of change; docs/measurements has the
# figures, and what those of GPTQ rest on.
_PUBLISHED: Mapping[str, tuple[float, float]] = {
    "gguf Q8_0": (0.005, 0.0034),
    "gguf Q6_K": (0.013, 0.01),
    "gguf Q5_K_M": (0.025, 0.027),
    "gguf Q5_0": (0.040, 0.056),
    "gguf Q4_K_M": (0.078, 0.079),
    "gguf Q4_K_S": (0.080, 0.11),
    "gguf IQ4_NL": (0.090, 0.090),
    "gguf IQ4_XS": (0.092, 0.091),
    "gguf Q4_0": (0.190, 0.18),
    "gguf Q3_K_L": (0.230, 0.22),
    "gguf Q3_K_M": (0.270, 0.25),
    "gguf IQ3_M": (0.270, 0.25),
    "gguf IQ3_S": (0.300, 0.28),
    "gguf IQ3_XS": (0.380, 0.35),
    "gguf IQ3_XXS": (0.500, 0.46),
    "gguf IQ2_M": (0.960, 0.8),
} | {
    f"{backend} {quant_name(bits, group)}": limits
    for backend in ("gptq", "gptqmodel")
    # For one group a row the same rule gives no less than below 1 B.
    for group in (32, 64, 128)
    for bits, limits in ((4, (0.100, 0.10)), (3, (0.410, 0.31)))
}
# The largest share of the full KL divergence that the form over vLLM's 20 likeliest tokens was measured to be, 0.942,
# rounded up; docs/measurements has the others.
TOP_K_SHARE = 0.95


def _with_top_k(label: str, gate: Gate) -> Gate:
    """vLLM, which gives the likeliest tokens only, serves every format but this one."""
    limit = math.inf if label.startswith("gguf ") else round(TOP_K_SHARE * gate.max_divergence, 6)
    return replace(gate, max_top_k_divergence=limit)


def _large(label: str, gate: Gate) -> Gate:
    delta, divergence = _PUBLISHED.get(label, (gate.max_delta, gate.max_divergence))
    return replace(gate, max_delta=delta, max_divergence=divergence, size_class="from_1b")


# Below 1 B, and from there on.
DEFAULT_GATES: Mapping[str, Gate] = {label: _with_top_k(label, gate) for label, gate in _MEASURED.items()}
LARGE_GATES: Mapping[str, Gate] = {label: _with_top_k(label, _large(label, gate)) for label, gate in _MEASURED.items()}
# For formats of other packages, until they say better with --gate.
FALLBACK_GATE = _with_top_k("", Gate(0.10, 0.85, 0.10))


def size_class(parameters: int) -> SizeClass:
    """The class of a model of so many parameters."""
    return "from_1b" if parameters >= LARGE else "below_1b"


def gate_for(label: str, quant: str, overrides: Mapping[str, float | Limits], parameters: int) -> Gate:
    """The gate of an artifact.

    Args:
        label: format and type, for example `gguf Q4_K_M`.
        quant: the type alone.
        overrides: by type, in any case, or by `*`: a number is the largest change of perplexity, and the only limit
            then; `Limits` replace those that they name. Those of the type come on top of those of `*`.
        parameters: of the merged model.
    """
    size = size_class(parameters)
    gate = (LARGE_GATES if size == "from_1b" else DEFAULT_GATES).get(label, replace(FALLBACK_GATE, size_class=size))
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
        return Gate(limit, 0.0, size_class=gate.size_class)
    names = {
        "change": "max_delta",
        "kl": "max_divergence",
        "top_k_kl": "max_top_k_divergence",
        "same_top": "min_same_top",
    }
    given = {names[key]: value for key, value in limit.model_dump(exclude_none=True).items()}
    return replace(gate, **given)
