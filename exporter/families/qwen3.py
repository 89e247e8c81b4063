"""Qwen3, dense: q and k normalized per head, no bias, head size of its own."""

from __future__ import annotations

from exporter.families.base import (
    ATTENTION,
    MLP,
    NORM_AFTER_ATTENTION,
    NORM_BEFORE_ATTENTION,
    QK_NORM,
    Family,
)
from exporter.families.gguf import Fixed, GgufSpelling

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=(*NORM_BEFORE_ATTENTION, *ATTENTION, *QK_NORM, *NORM_AFTER_ATTENTION, *MLP),
    gguf=GgufSpelling("qwen3", fixed=(Fixed("attention_bias", False, False, "llama.cpp has no such biases in qwen3"),)),
)
