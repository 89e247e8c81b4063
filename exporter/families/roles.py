"""Reads tensor names: the only file that does."""

from __future__ import annotations

import re
from collections.abc import Iterable

_EXPERT = re.compile(r"^(.+\.experts)\.\d+\.[^.]+\.weight$")


def experts_of(name: str) -> str | None:
    """What vLLM calls the layer of all experts that a weight belongs to, such as `model.layers.0.mlp.experts`.

    It makes one of all of them, and looks up settings by this name (FusedMoE in model_executor/models/qwen3_moe.py).
    None for any other weight.
    """
    match = _EXPERT.match(name)
    return match[1] if match else None


def layer_of(name: str) -> str:
    """What the names of the tensors of the same decoder layer begin with; empty outside of the layers."""
    found = re.match(r".*\.layers\.\d+\.", name)
    return found[0] if found else ""


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Ends of the names of buffers that older checkpoints carry and every runtime computes anew.
RECOMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


def model_order(name: str) -> tuple[int, int]:
    """Sort key: embedding first, then layers by number, then the rest, the head last."""
    if "embed_tokens" in name:
        return (0, 0)
    if match := re.search(r"\.layers\.(\d+)\.", name):
        return (1, int(match[1]))
    return (3, 0) if name.startswith("lm_head") else (2, 0)


# Modules below one parent that are given the same input; vLLM fuses the same ones into one matrix.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def shared_inputs(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group weights by the input that their modules share, in the order of the first of each group.

    Args:
        names: names of weights, such as `model.layers.0.mlp.up_proj.weight`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        kind = next((members[0] for members in SHARED_INPUT if leaf in members), leaf)
        groups.setdefault((parent, kind), []).append(name)
    return [tuple(group) for group in groups.values()]
