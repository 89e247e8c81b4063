"""Measured limits of the GPTQ types, whoever solved for them."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.backends.gptq.names import GROUP_SIZES, quant_name
from exporter.backends.type_limits import TypeLimits

# By bits: change of perplexity, same top token and divergence below 1 B. Smaller groups lose less, and are held to the
# limit of the largest. docs/measurements has the measurements.
_MEASURED: Mapping[int, tuple[float, float, float]] = {
    8: (0.010, 0.95, 0.004),
    4: (0.150, 0.80, 0.15),
    3: (0.600, 0.60, 0.45),
    2: (2.500, 0.50, 2.0),
}
# Change and divergence from 1 B on, by the rule of GGUF's; docs/measurements says what they rest on. For one group a
# row the same rule gives no less than below 1 B.
_PUBLISHED: Mapping[int, tuple[float, float]] = {4: (0.100, 0.10), 3: (0.410, 0.31)}

LIMITS: Mapping[str, TypeLimits] = {
    quant_name(bits, group): TypeLimits(*measured, published=_PUBLISHED.get(bits) if group > 0 else None)
    for bits, measured in _MEASURED.items()
    for group in GROUP_SIZES
}
