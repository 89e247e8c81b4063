"""Measured limits of the safetensors dtypes."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.backends.type_limits import TypeLimits

# Change of perplexity, same top token and divergence, whatever the size of the model; docs/measurements has the
# measurements.
LIMITS: Mapping[str, TypeLimits] = {
    "fp32": TypeLimits(0.001, 0.99, 0.0005),
    "fp16": TypeLimits(0.003, 0.97, 0.001),
    "bf16": TypeLimits(0.010, 0.95, 0.004),
}
