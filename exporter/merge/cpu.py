"""Merges row blocks on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from exporter.adapters.lora import LowRankUpdate
from exporter.adapters.lora_rows import add_update, read_left_rows
from exporter.inputs.checkpoint import StoredTensor
from exporter.inputs.row_blocks import DTYPES, TILE_ROWS, RowBlock, Workspace
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.model import MergedTensor


class CpuMerger:
    """Merges on the CPU; one thread a block. A block is valid until its thread asks for the next one."""

    device = "cpu"

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._workspace = Workspace()

    def factors(self, tensor: MergedTensor) -> tuple[torch.Tensor, ...]:
        """See `Merger`. For an embedding (transposed) the factor is B, shape (hidden, rank)."""
        return tuple(self._whole(update.b if update.transposed else update.a) for update in tensor.updates)

    def block(
        self,
        tensor: MergedTensor,
        block: RowBlock,
        factors: tuple[torch.Tensor, ...],
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Merger`."""
        shape = (block.count, tensor.source.columns)
        stored = self._workspace.take("stored", DTYPES[tensor.source.dtype], shape)
        raw = stored.view(torch.uint8).numpy().reshape(-1)
        self._reader.read_into(raw.data, tensor.source, block.first * tensor.source.row_bytes)
        merged = self._workspace.take("merged", torch.float32, shape).copy_(stored)
        if base is not None:
            base.copy_(merged)
        for update, factor in zip(tensor.updates, factors, strict=True):
            add_update(merged, self.left_rows(update, block), factor, update, TILE_ROWS["cpu"], self._workspace)
        return merged

    def on_device(self) -> AbstractContextManager[None]:
        """See `Merger`. Nothing is queued on the CPU."""
        return nullcontext()

    def left_rows(self, update: LowRankUpdate, block: RowBlock) -> torch.Tensor:
        """The rows of the left factor that a block needs: float32, shape (block.count, rank)."""
        return read_left_rows(self._reader, update, block)

    def _whole(self, tensor: StoredTensor) -> torch.Tensor:
        raw = self._reader.rows(tensor, 0, tensor.rows)
        # Copied even where it is float32 already: torch's own memory is aligned, and the products' last bits may
        # depend on that.
        return torch.frombuffer(raw, dtype=DTYPES[tensor.dtype]).view(tensor.shape).to(torch.float32, copy=True)
