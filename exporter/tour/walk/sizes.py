"""Sizes that bound the memory of a tour. Apart from the code that uses them, since the plan must not wait for torch."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens of one pass through a layer: enough to keep the processor busy, few enough to bound its activations.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
# Rows of the head that are turned into float32 at a time.
HEAD_ROWS = 8192
# All hidden states together stay in memory up to this size.
KEEP_BYTES = 4 << 30
# Predictions whose logits exist at a time: those of a window of 512. For each such part the head is turned into float32
# once more.
LOGIT_ROWS = 256


def stay_in_memory(sizes: Sequence[int], keep_bytes: int) -> list[bool]:
    """Which groups of hidden states stay in memory: the smallest ones, as long as their sum fits. The plan and the walk
    both ask, so that what is planned for is what happens.

    Args:
        sizes: bytes of each group.
        keep_bytes: bytes that all of them together may take.
    """
    stay = [False] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda one: sizes[one]):
        keep_bytes -= sizes[number]
        stay[number] = keep_bytes >= 0
    return stay
