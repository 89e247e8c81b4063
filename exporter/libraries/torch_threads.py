"""How many threads torch computes with: a setting of the whole process, which several parts of a run want otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_threads(threads: int) -> None:
    """Let torch use the threads, or as many of them as are a power of two.

    Elementwise functions cut their work into as many pieces, and where a piece does not end with a whole vector
    register its last elements are computed by another code, whose last bits differ. Pieces of a power of two end with
    one, so the results are the same for every number of threads.

    Args:
        threads: at least 1.
    """
    torch.set_num_threads(1 << (threads.bit_length() - 1))


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Afterwards torch uses as many threads as before.

    Merging sets one, as it works on several row blocks at once. What computes next would be left with that.
    """
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
