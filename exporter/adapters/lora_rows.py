"""Rows of a LoRA update, added to rows of the base in float32."""

from __future__ import annotations

import torch

from exporter.inputs.checkpoint import StoredTensor
from exporter.inputs.row_blocks import DTYPES, RowBlock, Workspace, read_block
from exporter.inputs.tensor_reader import TensorReader


def read_left_rows(reader: TensorReader, left: StoredTensor, block: RowBlock, *, transposed: bool) -> torch.Tensor:
    """Rows of B, or for an embedding the same columns of A transposed: float32 on the CPU, (block.count, rank).

    Args:
        reader: reads the adapter's file.
        left: B, shape (out_features, rank); or A, shape (rank, vocabulary).
        block: which rows of the weight.
        transposed: whether it is A.
    """
    if not transposed:
        return read_block(reader, left, block)
    rank = left.shape[0]
    rows = torch.empty(block.count, rank)
    item = left.row_bytes // left.columns
    for k in range(rank):
        raw = reader.slice(left, k * left.row_bytes + block.first * item, block.count * item)
        rows[:, k] = torch.frombuffer(raw, dtype=DTYPES[left.dtype])
    return rows


def add_product(
    merged: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    tile_rows: int,
    workspace: Workspace | None = None,
) -> None:
    """Add `scale * (left @ right)` to float32 `merged`, in place, tile by tile.

    Args:
        merged: (rows, columns).
        left: (rows, rank).
        right: (rank, columns).
        scale: the factor of the product.
        tile_rows: height of one product.
        workspace: where the product goes; None to allocate it.
    """
    for first in range(0, merged.shape[0], tile_rows):
        tile = merged[first : first + tile_rows]
        product = workspace.take("product", torch.float32, tuple(tile.shape)) if workspace else torch.empty_like(tile)
        torch.mm(left[first : first + tile_rows], right, out=product)
        tile.add_(product.mul_(scale))
