"""Rows of a LoRA update, added to rows of the base in float32."""

from __future__ import annotations

import torch

from exporter.adapters.lora import LowRankUpdate
from exporter.inputs.row_blocks import DTYPES, RowBlock, Workspace
from exporter.inputs.tensor_reader import TensorReader


def read_left_rows(reader: TensorReader, update: LowRankUpdate, block: RowBlock) -> torch.Tensor:
    """Rows of B, or for an embedding the same columns of A transposed: float32 on the CPU, (block.count, rank)."""
    if not update.transposed:
        raw = reader.rows(update.b, block.first, block.count)
        rows = torch.frombuffer(raw, dtype=DTYPES[update.b.dtype]).view(block.count, update.rank)
        return rows.to(torch.float32, copy=True)
    left = torch.empty(block.count, update.rank)
    item = update.a.row_bytes // update.a.columns
    for k in range(update.rank):
        raw = reader.slice(update.a, k * update.a.row_bytes + block.first * item, block.count * item)
        left[:, k] = torch.frombuffer(raw, dtype=DTYPES[update.a.dtype])
    return left


def add_update(
    merged: torch.Tensor,
    left: torch.Tensor,
    factor: torch.Tensor,
    update: LowRankUpdate,
    tile_rows: int,
    workspace: Workspace | None = None,
) -> None:
    """Add `scale * (left @ right)` to float32 `merged`, in place, tile by tile.

    Args:
        merged: (rows, columns).
        left: (rows, rank).
        factor: (rank, columns), or its transpose for an embedding.
        update: gives the scale and whether the factor is transposed.
        tile_rows: height of one product.
        workspace: where the product goes; None to allocate it.
    """
    right = factor.T if update.transposed else factor
    for first in range(0, merged.shape[0], tile_rows):
        tile = merged[first : first + tile_rows]
        product = workspace.take("product", torch.float32, tuple(tile.shape)) if workspace else torch.empty_like(tile)
        torch.mm(left[first : first + tile_rows], right, out=product)
        tile.add_(product.mul_(update.scale))
