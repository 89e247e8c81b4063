"""Qwen1.5, Qwen2 and Qwen2.5, dense: a bias on q, k and v, no q/k norm."""

from __future__ import annotations

from exporter.families.base import ATTENTION_WITH_BIAS, MLP, NORM_AFTER_ATTENTION, NORM_BEFORE_ATTENTION, Family
from exporter.families.gguf import GgufSpelling

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=(*NORM_BEFORE_ATTENTION, *ATTENTION_WITH_BIAS, *NORM_AFTER_ATTENTION, *MLP),
    # llama.cpp calls Qwen2 models of 80 layers LLM_TYPE_70B (src/models/qwen2.cpp).
    gguf=GgufSpelling("qwen2", large_layers=80),
)
