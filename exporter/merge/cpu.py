"""Merges row blocks on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from exporter.adapters.base import RowInputs
from exporter.inputs.row_blocks import DTYPES, TILE_ROWS, RowBlock, Workspace
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.merger import Factors
from exporter.merge.model import MergedTensor


class CpuMerger:
    """Merges on the CPU; one thread a block. A block is valid until its thread asks for the next one."""

    device = "cpu"

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._workspace = Workspace()

    def factors(self, tensor: MergedTensor) -> Factors:
        """See `Merger`."""
        return tuple(update.read_whole(self._reader, tensor.source) for update in tensor.updates)

    def block(
        self,
        tensor: MergedTensor,
        block: RowBlock,
        factors: Factors,
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
        kept = None
        if tensor.needs_base:
            kept = self._workspace.take("kept", torch.float32, shape).copy_(merged)
        for update, whole in zip(tensor.updates, factors, strict=True):
            rows = update.read_rows(self._reader, block)
            update.apply(merged, RowInputs(block.first, kept, whole, rows, TILE_ROWS["cpu"], self._workspace))
        return merged

    def on_device(self) -> AbstractContextManager[None]:
        """See `Merger`. Nothing is queued on the CPU."""
        return nullcontext()
