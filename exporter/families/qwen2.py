"""Qwen1.5, Qwen2 and Qwen2.5, dense: a bias on q, k and v, no q/k norm."""

from __future__ import annotations

from exporter.families.base import Family

QWEN2 = Family(
    model_type="qwen2", architecture="Qwen2ForCausalLM", gguf_architecture="qwen2", qkv_bias=True, qk_norm=False
)
