"""Base + adapters → float32 row blocks, on the CPU or on CUDA.

Each adapter's update changes float32 rows of the base in turn, such as `float32(W) + scale * (B @ A)`, and nothing is
rounded here. Rows are computed in tiles of a fixed height that start at multiples of it, so the shape of every matrix
product, and with it every last bit, depends on the tensor and the device alone: not on the size of the blocks that are
read, nor on how many threads read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from exporter.errors import NonFiniteTensorError
from exporter.inputs.row_blocks import RowBlock
from exporter.merge.model import MergedTensor

# What the updates of a tensor read once for all of its rows: by update, float32 tensors.
Factors = tuple[tuple[torch.Tensor, ...], ...]


class Merger(Protocol):
    """Computes merged row blocks on one device. Used from several threads at once."""

    device: str

    def block(
        self,
        tensor: MergedTensor,
        block: RowBlock,
        factors: Factors,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Merged rows: float32, shape (block.count, columns), on `device`.

        Args:
            tensor: the merged tensor.
            block: which rows.
            factors: what `factors` returned for the tensor.
            base: takes the base's own rows as well: any float dtype and device, shape (block.count, columns).
        """

    def factors(self, tensor: MergedTensor) -> Factors:
        """What the tensor's updates need for every row (`Update.read_whole`), on `device`; read once a tensor."""

    def on_device(self) -> AbstractContextManager[None]:
        """Where this thread's blocks are computed, and must be used: a device may give a block's memory to the same
        thread's next one without waiting for what was queued elsewhere. What is queued inside is done on leaving."""


def merge_noise(tensor: MergedTensor) -> float:
    """How far merges of a tensor on two processors may be apart, as a share of the largest values around an element.

    Products of float32 are summed in other orders: of a random walk, by a rounding times the root of the terms. Merges
    in the opposite of two ways were 2.6e-7 apart at rank 16, and 5.4e-7 where the change was five times the base; this
    is 1.2e-6 there. What no adapter changes is the base itself everywhere.
    """
    terms = sum(update.noise_terms for update in tensor.updates)
    return 2.0**-22 * (1 + math.sqrt(terms)) if tensor.updates else 0.0


def check_finite(tensor: MergedTensor, block: torch.Tensor) -> float:
    """Largest magnitude of a block.

    Raises:
        NonFiniteTensorError: the block holds NaN or infinity.
    """
    if block.numel() == 0:
        return 0.0
    low, high = torch.aminmax(block)
    peak = max(-low.item(), high.item())
    if not math.isfinite(peak):
        raise NonFiniteTensorError(
            tensor.name,
            found="NaN or infinity" + (" after the merge" if tensor.updates else ""),
            expected="finite numbers",
            remedy=f"{tensor.source.file.name} is damaged or was saved from a diverged run: fetch it again.",
        )
    return peak


def gather_rows(merger: Merger, tensor: MergedTensor, rows: Sequence[int]) -> torch.Tensor:
    """Some merged rows of a tensor: float32 on the CPU, shape (len(rows), columns)."""
    factors = merger.factors(tensor)
    found = torch.empty(len(rows), tensor.source.columns)
    for place, row in enumerate(rows):
        found[place] = merger.block(tensor, RowBlock(row, 1), factors)[0]
    return found
