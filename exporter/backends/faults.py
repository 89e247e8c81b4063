"""Faults of many tensors at once, in words: the first ones, and how many more there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Tensors that are named for the same fault.
NAMED = 3


def named_faults(faults: Sequence[str]) -> Iterator[str]:
    """The first ones, and how many more there are.

    Args:
        faults: one a tensor, all of the same kind.
    """
    yield from faults[:NAMED]
    if len(faults) > NAMED:
        yield f"so it is with {len(faults) - NAMED} more tensors"
