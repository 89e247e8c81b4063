"""Measured limits and rates of the GGUF types."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.backends.type_limits import TypeLimits


def _limits(
    change: float, same_top: float, divergence: float, published: tuple[float, float] | None = None
) -> TypeLimits:
    """llama.cpp gives whole predictions, so there is no top-k form of the divergence."""
    return TypeLimits(change, same_top, divergence, published, top_k=False)


# By file type: change of perplexity, same top token and divergence below 1 B; then change and divergence from 1 B on,
# which are 2.5 times the larger published figure, rounded up to two digits, and no less than 0.5 % of change.
# docs/measurements has the measurements and the published figures.
LIMITS: Mapping[str, TypeLimits] = {
    "F32": _limits(0.002, 0.98, 0.001),
    "F16": _limits(0.003, 0.97, 0.001),
    "BF16": _limits(0.005, 0.96, 0.002),
    "Q8_0": _limits(0.010, 0.95, 0.004, (0.005, 0.0034)),
    "Q6_K": _limits(0.020, 0.93, 0.01, (0.013, 0.01)),
    "Q5_K_M": _limits(0.030, 0.90, 0.03, (0.025, 0.027)),
    "Q5_K_S": _limits(0.030, 0.90, 0.04),
    "Q5_1": _limits(0.040, 0.90, 0.04),
    "Q5_0": _limits(0.040, 0.86, 0.1, (0.040, 0.056)),
    "Q4_K_M": _limits(0.080, 0.85, 0.12, (0.078, 0.079)),
    "Q4_K_S": _limits(0.080, 0.85, 0.12, (0.080, 0.11)),
    "IQ4_NL": _limits(0.120, 0.84, 0.12, (0.090, 0.090)),
    "IQ4_XS": _limits(0.120, 0.84, 0.12, (0.092, 0.091)),
    "Q4_1": _limits(0.150, 0.80, 0.15),
    "Q4_0": _limits(0.400, 0.72, 0.45, (0.190, 0.18)),
    "Q3_K_L": _limits(0.250, 0.75, 0.25, (0.230, 0.22)),
    "Q3_K_M": _limits(0.300, 0.70, 0.25, (0.270, 0.25)),
    "Q3_K_S": _limits(0.500, 0.65, 0.45),
    "IQ3_M": _limits(0.300, 0.75, 0.25, (0.270, 0.25)),
    "IQ3_S": _limits(0.300, 0.72, 0.3, (0.300, 0.28)),
    "IQ3_XS": _limits(0.400, 0.70, 0.35, (0.380, 0.35)),
    "IQ3_XXS": _limits(0.500, 0.65, 0.6, (0.500, 0.46)),
    "Q2_K": _limits(1.000, 0.50, 1.0),
    "Q2_K_S": _limits(1.000, 0.50, 1.0),
    "IQ2_M": _limits(1.000, 0.50, 0.8, (0.960, 0.8)),
    "IQ2_S": _limits(1.000, 0.50, 1.0),
    "IQ2_XS": _limits(1.000, 0.50, 1.2),
    "IQ2_XXS": _limits(1.000, 0.45, 1.8),
    "IQ1_M": _limits(1.000, 0.40, 2.5),
    "IQ1_S": _limits(1.000, 0.40, 3.0),
}
# Elements a second and thread of ggml_quantize_chunk, by the type of the stored tensor (scripts/benchmark.py).
QUANTIZE_RATES: Mapping[str, float] = {
    "Q8_0": 165e6, "Q4_0": 570e6, "Q4_1": 700e6, "Q5_0": 330e6, "Q5_1": 320e6, "Q6_K": 27e6, "Q5_K": 14e6,
    "Q4_K": 11e6, "Q3_K": 58e6, "Q2_K": 11e6, "IQ4_NL": 3.4e6, "IQ4_XS": 3.4e6,
}  # fmt: skip
