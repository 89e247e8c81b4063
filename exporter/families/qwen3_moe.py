"""Qwen3 with a mixture of experts (30B-A3B, 235B-A22B, Coder): attention of Qwen3, experts one by one, none shared.

transformers gives a layer experts unless `mlp_only_layers` names it or `decoder_sparse_step` passes over it
(Qwen3MoeDecoderLayer in models/qwen3_moe/modeling_qwen3_moe.py); the others are dense.
"""

from __future__ import annotations

from exporter.families.base import (
    ATTENTION,
    MLP,
    NORM_AFTER_ATTENTION,
    NORM_BEFORE_ATTENTION,
    QK_NORM,
    Config,
    Family,
    Row,
)
from exporter.families.gguf import Fixed, GgufSpelling


def has_experts(config: Config, layer: int) -> bool:
    """Whether a layer has experts."""
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def is_dense(config: Config, layer: int) -> bool:
    """Whether a layer has the dense matrices in their place."""
    return not has_experts(config, layer)


EXPERTS = (
    Row("mlp.gate.weight", ("experts", "hidden"), has_experts),
    Row("mlp.experts.{expert}.gate_proj.weight", ("expert_inner", "hidden"), has_experts),
    Row("mlp.experts.{expert}.up_proj.weight", ("expert_inner", "hidden"), has_experts),
    Row("mlp.experts.{expert}.down_proj.weight", ("hidden", "expert_inner"), has_experts),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer=(
        *NORM_BEFORE_ATTENTION,
        *ATTENTION,
        *QK_NORM,
        *NORM_AFTER_ATTENTION,
        *EXPERTS,
        *(Row(row.name, row.sizes, is_dense) for row in MLP),
    ),
    sizes={
        # transformers 5 saves the second name.
        "experts": ("num_experts", "num_local_experts"),
        "experts_used": ("num_experts_per_tok",),
        "expert_inner": ("moe_intermediate_size",),
    },
    experts="experts",
    gguf=GgufSpelling(
        "qwen3moe",
        keys=(
            ("expert_count", "experts"),
            ("expert_used_count", "experts_used"),
            ("expert_feed_forward_length", "expert_inner"),
        ),
        fixed=(
            Fixed("attention_bias", False, False, "llama.cpp has no such biases in qwen3moe"),
            Fixed("norm_topk_prob", True, False, "llama.cpp makes the chosen experts' weights add up to 1"),
            Fixed("mlp_only_layers", [], [], "every layer of qwen3moe has experts in llama.cpp"),
            Fixed("decoder_sparse_step", 1, 1, "every layer of qwen3moe has experts in llama.cpp"),
        ),
    ),
)
