"""Sizes that bound the memory of a tour. Apart from the code that uses them, since the plan must not wait for torch."""

from __future__ import annotations

from collections.abc import Iterable

# Tokens of one pass through a layer: enough to keep the processor busy, few enough to bound its activations.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
# Rows of the head that are turned into float32 at a time.
HEAD_ROWS = 16384
# Hidden states up to this size stay in memory.
KEEP_BYTES = 4 << 30
# Predictions whose logits exist at a time.
LOGIT_ROWS = 64
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
