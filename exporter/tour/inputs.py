"""Which modules of a layer are given the same input. Without torch, for the plan asks too."""

from __future__ import annotations

from collections.abc import Iterable

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
