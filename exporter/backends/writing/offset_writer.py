"""Writing planned files: rows at their offsets, in whatever order they come."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.backends.base import Writer
from exporter.backends.output_plan import OutputPlan, TensorPlan
from exporter.backends.writing.checksums import TensorChecksums
from exporter.backends.writing.following_hash import FollowingHash
from exporter.errors import WriteError

if TYPE_CHECKING:
    import torch


# Bytes that are hashed at a time.
_HASH_BYTES = 1 << 22

Encoder = Callable[[TensorPlan, "torch.Tensor"], "bytes | bytearray | memoryview"]


class OffsetWriter(Writer):
    """A `Writer` for formats whose files are a header and tensors at fixed offsets.

    Args:
        plan: the artifact's plan.
        folder: where its files go.
        encode: turns float32 rows into stored bytes; called from several threads at once.
        resume: keep what is in the files.

    Raises:
        WriteError: the disk is full or the file cannot be made.
    """

    def __init__(self, plan: OutputPlan, folder: Path, encode: Encoder, *, resume: bool) -> None:
        self._encode = encode
        self._descriptors: dict[str, int] = {}
        self._hashes: dict[str, FollowingHash] = {}
        self._checksums = TensorChecksums()
        self._hash_pool = ThreadPoolExecutor(1, thread_name_prefix="hash-output")
        buffer = bytearray(_HASH_BYTES)
        # The kernel lets one thread at a time write to a file, and the others spin; waiting here, they sleep.
        self._locks = {file.name: threading.Lock() for file in plan.files}
        try:
            for file in plan.files:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_TRUNC)
                self._descriptors[file.name] = descriptor = os.open(folder / file.name, flags, 0o644)
                # Reserving the room now turns a full disk into an error at the start, and makes the padding zeros.
                os.posix_fallocate(descriptor, 0, max(1, file.nbytes))
                _write_all(descriptor, file.header, 0)
                inside = [tensor for tensor in plan.tensors if tensor.file == file.name]
                self._hashes[file.name] = FollowingHash(descriptor, file.nbytes, inside, self._hash_pool, buffer)
        except OSError as error:
            self.close()
            raise WriteError(
                str(folder), found=str(error), expected="room to write", remedy="Free some disk and run again."
            ) from None

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None:
        """See `Writer`."""
        rows, data = block.shape[0], self.encoded(tensor, first_row, block)
        _check_size(tensor, rows, data)
        # Of what the encoder returned, whatever becomes of it.
        encoded = np.frombuffer(data, dtype=np.uint8).reshape(rows, tensor.row_bytes)
        self._checksums.add(tensor.name, tensor.rows, first_row, encoded)
        self._put(tensor, first_row, rows, data)

    def encoded(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> bytes | bytearray | memoryview:
        """Rows as they are stored; overridden where an encoder must know which rows these are.

        Args:
            tensor: one of the plan's tensors.
            first_row: number of the first of these rows.
            block: float32, shape (rows, columns).
        """
        del first_row
        return self._encode(tensor, block)

    def store(self, tensor: TensorPlan, data: memoryview) -> None:
        """Store all rows of a tensor as they are.

        Raises:
            WriteError: the data is not of its size, or the disk is full.
        """
        _check_size(tensor, tensor.rows, data)
        self._put(tensor, 0, tensor.rows, data)

    def _put(self, tensor: TensorPlan, first_row: int, rows: int, data: bytes | bytearray | memoryview) -> None:
        try:
            with self._locks[tensor.file]:
                _write_all(self._descriptors[tensor.file], data, tensor.offset + first_row * tensor.row_bytes)
        except OSError as error:
            raise WriteError(
                tensor.file, found=str(error), expected="room to write", remedy="Free some disk and run again."
            ) from None
        self._hashes[tensor.file].wrote(tensor, rows)

    def sync(self) -> None:
        """See `Writer`. What is on the disk and hashed gives its memory back, or it would push the inputs out of it."""
        for name, descriptor in self._descriptors.items():
            os.fdatasync(descriptor)
            if hashed := self._hashes[name].hashed:
                os.posix_fadvise(descriptor, 0, hashed, os.POSIX_FADV_DONTNEED)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, hexadecimal. Every tensor must be written."""
        return {name: following.finish() for name, following in self._hashes.items()}

    def checksum(self, tensor: str) -> str | None:
        """See `Writer`: of a tensor whose rows came through `write`."""
        return self._checksums.take(tensor)

    def close(self) -> None:
        """See `Writer`."""
        self._hash_pool.shutdown(cancel_futures=True)
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _check_size(tensor: TensorPlan, rows: int, data: bytes | bytearray | memoryview) -> None:
    if len(data) != tensor.row_bytes * rows:
        raise WriteError(
            tensor.name,
            found=f"{len(data)} bytes",
            expected=f"{tensor.row_bytes * rows}",
            remedy="This is a defect of the backend.",
        )


def _write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def encode_float(block: torch.Tensor, kind: str, name: str) -> memoryview:
    """Round float32 rows once to F32, F16 or BF16 (to nearest, ties to even).

    Raises:
        OverflowRefusedError: a value does not fit F16.
    """
    import torch

    from exporter.errors import OverflowRefusedError

    if kind == "BF16":
        stored = block.to(torch.bfloat16).view(torch.int16)
    elif kind == "F16":
        stored = block.to(torch.float16)
        if not torch.isfinite(stored).all():
            raise OverflowRefusedError(
                name,
                found=f"{block.abs().max().item():.6g}",
                expected="at most 65504, the largest float16",
                remedy="Choose bf16 or fp32.",
            )
        stored = stored.view(torch.int16)
    else:
        stored = block
    return stored.cpu().contiguous().numpy().data.cast("B")
