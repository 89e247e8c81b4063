"""Measured limits and rates of the GGUF types."""

from __future__ import annotations

QUANTIZE_RATE = {
    "Q8_0": 165e6, "Q4_0": 570e6, "Q4_1": 700e6, "Q5_0": 330e6, "Q5_1": 320e6, "Q6_K": 27e6, "Q5_K": 14e6,
    "Q4_K": 11e6, "Q3_K": 58e6, "Q2_K": 11e6, "IQ4_NL": 3.4e6, "IQ4_XS": 3.4e6,
}  # fmt: skip
