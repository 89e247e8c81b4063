"""Roles of tensors by their names."""

from __future__ import annotations

import re

import pytest

from exporter.families.roles import (
    Role,
    experts_of,
    fused_modules,
    is_dense_down,
    is_expert_down,
    is_projection,
    is_recomputed,
    layer_of,
    leaf_of,
    model_order,
    parse,
    shared_inputs,
)

LAYER = "model.layers.11."
NESTED = "model.language_model.layers.3."
ROLES = {
    "model.embed_tokens.weight": Role.EMBEDDING,
    "model.language_model.embed_tokens.weight": Role.EMBEDDING,
    "model.norm.weight": Role.FINAL_NORM,
    "lm_head.weight": Role.HEAD,
    f"{LAYER}input_layernorm.weight": Role.INPUT_NORM,
    f"{LAYER}self_attn.q_proj.weight": Role.Q,
    f"{LAYER}self_attn.q_proj.bias": Role.Q,
    f"{NESTED}self_attn.o_proj.weight": Role.O,
    f"{LAYER}self_attn.k_norm.weight": Role.K_NORM,
    f"{LAYER}mlp.down_proj.weight": Role.DOWN,
    f"{LAYER}mlp.gate.weight": Role.ROUTER,
    f"{LAYER}mlp.experts.7.gate_proj.weight": Role.EXPERT_GATE,
    f"{LAYER}mlp.shared_expert.up_proj.weight": Role.SHARED_UP,
    f"{LAYER}mlp.shared_expert_gate.weight": Role.SHARED_EXPERT_GATE,
    # Of a family that is not known here, by today's pattern.
    "transformer.layers.2.attention.query_proj.weight": Role.LINEAR,
    "transformer.layers.2.attention.dense.weight": Role.OTHER,
    "mtp.layers.0.mlp.up_proj.weight": Role.MTP,
    "mtp.fc.weight": Role.MTP,
    f"{LAYER}self_attn.rotary_emb.inv_freq": Role.RECOMPUTED,
    "model.visual.blocks.0.attn.qkv.weight": Role.OTHER,
}


@pytest.mark.parametrize("name", ROLES)
def test_role(name: str) -> None:
    assert parse(name).role is ROLES[name]


def test_places() -> None:
    found = parse(f"{NESTED}mlp.experts.40.down_proj.weight")
    assert (found.layer, found.layer_prefix, found.expert) == (3, NESTED, 40)
    assert found.experts == f"{NESTED}mlp.experts"
    assert parse("model.norm.weight").layer is None


@pytest.mark.parametrize("name", ROLES)
def test_projections_are_those_of_the_pattern_that_gptq_had(name: str) -> None:
    """The pattern of the version that packed dense models, as a witness that knows no roles."""
    before = re.match(r"^.+\.layers\.\d+\..*_proj\.weight$", name) is not None and not name.startswith("mtp.")
    assert is_projection(name) is before


def test_experts_and_last_matrices() -> None:
    assert experts_of(f"{LAYER}mlp.experts.3.up_proj.weight") == f"{LAYER}mlp.experts"
    assert experts_of(f"{LAYER}mlp.shared_expert.up_proj.weight") is None
    assert is_dense_down(f"{LAYER}mlp.down_proj.weight")
    assert not is_dense_down(f"{LAYER}mlp.experts.3.down_proj.weight")
    assert is_expert_down(f"{LAYER}mlp.experts.3.down_proj.weight")
    assert is_recomputed(f"{LAYER}self_attn.rotary_emb.inv_freq")
    assert layer_of(f"{LAYER}mlp.gate.weight") == LAYER
    assert layer_of("lm_head.weight") == ""


def test_leaves() -> None:
    assert leaf_of(f"{LAYER}self_attn.q_proj.bias") == "q_proj"
    assert leaf_of("lm_head.weight") == "lm_head"
    assert leaf_of(f"{LAYER}linear_attn.A_log") is None


def test_model_order() -> None:
    ordered = ["model.embed_tokens.weight", "model.layers.2.x.weight", "model.layers.10.x.weight", "model.norm.weight"]
    assert sorted([*reversed(ordered), "lm_head.weight"], key=model_order) == [*ordered, "lm_head.weight"]


def test_what_shares_an_input_and_what_vllm_makes_of_it() -> None:
    attention = [f"{LAYER}self_attn.{leaf}_proj.weight" for leaf in "qkvo"]
    mlp = [f"{LAYER}mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")]
    groups = shared_inputs(attention + mlp)
    assert groups == [tuple(attention[:3]), (attention[3],), tuple(mlp[:2]), (mlp[2],)]
    assert fused_modules(groups[0]) == [f"{LAYER}self_attn.qkv_proj"]
    assert fused_modules(groups[1]) == []
    assert fused_modules(groups[2]) == [f"{LAYER}mlp.gate_up_proj"]
    assert fused_modules([f"{LAYER}mlp.experts.0.up_proj.weight"]) == [f"{LAYER}mlp.experts"]
