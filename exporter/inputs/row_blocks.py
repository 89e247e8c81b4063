"""Row blocks: the unit in which weights are read, merged and written."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from exporter.inputs.checkpoint import StoredTensor
from exporter.inputs.tensor_reader import TensorReader

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Rows of one matrix product. On the CPU the tile stays in the cache; on CUDA it must be large enough to fill the chip.
TILE_ROWS = {"cpu": 64, "cuda": 1024}

# float32 bytes of a row block: small enough for the last-level cache, large enough to amortize the calls.
DEFAULT_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class RowBlock:
    """Rows `first` to `first + count` of one tensor."""

    first: int
    count: int


def row_blocks(tensor: StoredTensor, block_bytes: int, device: str) -> Iterator[RowBlock]:
    """Cut a tensor into blocks of about `block_bytes` of float32: whole tiles, but for a ragged last one."""
    if tensor.nbytes == 0:
        return
    tile = TILE_ROWS[torch.device(device).type]
    rows = max(1, block_bytes // (4 * max(1, tensor.columns)) // tile) * tile
    for first in range(0, tensor.rows, rows):
        yield RowBlock(first, min(rows, tensor.rows - first))


def read_block(reader: TensorReader, tensor: StoredTensor, block: RowBlock) -> torch.Tensor:
    """Some rows of a stored tensor: float32 on the CPU, shape (block.count, columns).

    Copied even where it is float32 already: torch's own memory is aligned, and the last bits of products may depend on
    that.
    """
    raw = reader.rows(tensor, block.first, block.count)
    rows = torch.frombuffer(raw, dtype=DTYPES[tensor.dtype]).view(block.count, tensor.columns)
    return rows.to(torch.float32, copy=True)


def read_tensor(reader: TensorReader, tensor: StoredTensor) -> torch.Tensor:
    """A whole stored tensor: float32 on the CPU."""
    return read_block(reader, tensor, RowBlock(0, tensor.rows)).view(tensor.shape)


class Workspace(threading.local):
    """Buffers that a thread uses again for every block, so that memory neither grows nor is faulted in anew."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialized tensor; it is valid until this thread takes the same name again."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        return buffer[:nbytes].view(dtype).view(shape)
