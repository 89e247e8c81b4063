"""Qwen3, dense: q and k normalized per head, no bias, head size of its own."""

from __future__ import annotations

from exporter.families.base import Family

QWEN3 = Family(
    model_type="qwen3", architecture="Qwen3ForCausalLM", gguf_architecture="qwen3", qkv_bias=False, qk_norm=True
)
