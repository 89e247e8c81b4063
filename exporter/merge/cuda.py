"""The merge on CUDA: copies staged through pinned memory, on one stream a thread, so that they overlap the products.

Each worker thread owns a stream and a pinned buffer. While one thread's block computes, another's copies in and a
third's result copies out; the order of blocks is the caller's business.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from exporter.adapters.base import RowInputs
from exporter.inputs.row_blocks import DTYPES, TILE_ROWS, RowBlock
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.cpu import CpuMerger
from exporter.merge.merger import Factors
from exporter.merge.model import MergedTensor


class CudaMerger:
    """Merges on a CUDA device; one stream and one pinned staging buffer a thread."""

    def __init__(self, reader: TensorReader, device: str) -> None:
        self.device = device
        self._reader = reader
        self._host = CpuMerger(reader)
        self._local = threading.local()
        # Products in true float32: TF32 keeps ten bits of the mantissa and would break the promise of the merge.
        torch.backends.cuda.matmul.allow_tf32 = False

    def factors(self, tensor: MergedTensor) -> Factors:
        """See `exporter.merge.Merger`. Synchronous, so that every worker's stream may read them."""
        return tuple(self._on_device(whole) for whole in self._host.factors(tensor))

    def block(
        self,
        tensor: MergedTensor,
        block: RowBlock,
        factors: Factors,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `exporter.merge.Merger`. Returns once the block is computed."""
        with self.on_device():
            raw = self._reader.rows(tensor.source, block.first, block.count)
            stored = torch.frombuffer(raw, dtype=DTYPES[tensor.source.dtype]).view(block.count, -1)
            merged = self._staged(stored).to(torch.float32)
            if base is not None:
                base.copy_(merged)
            kept = merged.clone() if tensor.needs_base else None
            for update, whole in zip(tensor.updates, factors, strict=True):
                rows = self._on_device(update.read_rows(self._reader, block))
                update.apply(merged, RowInputs(block.first, kept, whole, rows, TILE_ROWS["cuda"]))
        return merged

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """See `exporter.merge.Merger`. The thread's own stream, which the default stream's kernels do not hold up."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream()):
            yield
            self._stream().synchronize()

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._local.stream
        return stream

    def _on_device(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in tensors)

    def _staged(self, host: torch.Tensor) -> torch.Tensor:
        """Copy to the device through this thread's pinned buffer. The block before has been synchronized by now."""
        nbytes = host.numel() * host.element_size()
        buffer: torch.Tensor | None = getattr(self._local, "pinned", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._local.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        pinned = buffer[:nbytes].view(host.dtype).view(host.shape)
        pinned.copy_(host)
        return pinned.to(self.device, non_blocking=True)
