"""Single rows of merged tensors, and memory that goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from exporter.merge import Merger, RowBlock
from exporter.model import MergedTensor


def gather_rows(merger: Merger, tensor: MergedTensor, rows: Sequence[int]) -> torch.Tensor:
    """Some merged rows of a tensor: float32 on the CPU, shape (len(rows), columns)."""
    factors = merger.factors(tensor)
    found = torch.empty(len(rows), tensor.source.columns)
    for place, row in enumerate(rows):
        found[place] = merger.block(tensor, RowBlock(row, 1), factors)[0]
    return found


def release_free_memory() -> None:
    """Give what was freed back to the system. glibc keeps freed activations of tens of megabytes in its arenas, a few
    more with every layer: 20 MB a layer on a model of 0.5 B parameters."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
