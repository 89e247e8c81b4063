"""Base + adapters → float32 row blocks, on the CPU or on CUDA.

`float32(W) + scale * (B @ A)`, computed in float32 and never rounded here. Rows are computed in tiles of a fixed height
that start at multiples of it, so the shape of every matrix product, and with it every last bit, depends on the tensor
and the device alone: not on the size of the blocks that are read, nor on how many threads read them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from exporter.adapter import LowRankUpdate
from exporter.checkpoint import StoredTensor
from exporter.errors import DeviceUnavailableError, NonFiniteTensorError
from exporter.model import MergedTensor
from exporter.tensor_reader import TensorReader

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


class Merger(Protocol):
    """Computes merged row blocks on one device. Used from several threads at once."""

    device: str

    def block(
        self,
        tensor: MergedTensor,
        block: RowBlock,
        factors: tuple[torch.Tensor, ...],
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Merged rows: float32, shape (block.count, columns), on `device`.

        Args:
            tensor: the merged tensor.
            block: which rows.
            factors: what `factors` returned for the tensor.
            base: takes the base's own rows as well: any float dtype and device, shape (block.count, columns).
        """

    def factors(self, tensor: MergedTensor) -> tuple[torch.Tensor, ...]:
        """The A matrices of the tensor's updates, float32 (rank, in_features), on `device`; read once per tensor."""

    def on_device(self) -> AbstractContextManager[None]:
        """Where this thread's blocks are computed, and must be used: a device may give a block's memory to the same
        thread's next one without waiting for what was queued elsewhere. What is queued inside is done on leaving."""


def resolve_device(name: str) -> str:
    """Turn `auto` into `cuda` or `cpu` and check that the device exists.

    Raises:
        DeviceUnavailableError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise DeviceUnavailableError(
            f"--device {name}",
            found=f"{count} CUDA devices",
            expected="that device",
            remedy="Use --device auto or cpu.",
        )
    return name


def make_merger(device: str, reader: TensorReader) -> Merger:
    """The merger for a device that `resolve_device` returned."""
    if device == "cpu":
        # Parallelism is over row blocks; more threads inside a small product would only wait for each other.
        torch.set_num_threads(1)
        return CpuMerger(reader)
    from exporter.merge_cuda import CudaMerger

    return CudaMerger(reader, device)


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


def merge_noise(tensor: MergedTensor) -> float:
    """How far merges of a tensor on two processors may be apart, as a share of the largest values around an element.

    Products of float32 are summed in other orders: of a random walk, by a rounding times the root of the terms. Merges
    in the opposite of two ways were 2.6e-7 apart at rank 16, and 5.4e-7 where the change was five times the base; this
    is 1.2e-6 there. What no adapter changes is the base itself everywhere.
    """
    rank = sum(update.rank for update in tensor.updates)
    return 2.0**-22 * (1 + math.sqrt(rank)) if rank else 0.0


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
