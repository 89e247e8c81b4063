"""Reads rows of stored tensors, from several threads at once."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.errors import CheckpointError
from exporter.inputs.checkpoint import StoredTensor, truncated


class TensorReader:
    """Reads rows of stored tensors with bounded reads. Safe to use from several threads.

    Files are opened read-only on first use and closed by `close`.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def rows(self, tensor: StoredTensor, first: int, count: int) -> bytearray:
        """Read `count` rows from row `first` on.

        Returns:
            The raw bytes, `count * tensor.row_bytes` of them, in the tensor's dtype.

        Raises:
            TruncatedFileError: the file ended early.
        """
        return self.slice(tensor, first * tensor.row_bytes, count * tensor.row_bytes)

    def slice(self, tensor: StoredTensor, offset: int, nbytes: int) -> bytearray:
        """Read `nbytes` bytes from byte `offset` of the tensor's data on."""
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer), tensor, offset)
        return buffer

    def read_into(self, target: memoryview, tensor: StoredTensor, offset: int) -> None:
        """Fill `target`, a view of bytes, from byte `offset` of the tensor's data on.

        Raises:
            TruncatedFileError: the file ended early.
        """
        nbytes = len(target)
        if offset < 0 or offset + nbytes > tensor.nbytes:
            raise CheckpointError(
                tensor.name,
                found=f"a read of bytes {offset}..{offset + nbytes}",
                expected=f"at most {tensor.nbytes}",
                remedy="This is a defect of the caller.",
            )
        done, descriptor = 0, self._descriptor(tensor.file)
        while done < nbytes:
            got = os.preadv(descriptor, [target[done:]], tensor.start + offset + done)
            if got == 0:
                raise truncated(tensor.file, tensor.start + offset + done, tensor.start + tensor.nbytes)
            done += got

    def _descriptor(self, file: Path) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            # Two threads may race here: the first to store its descriptor wins, the other closes its own.
            descriptor = self._descriptors.setdefault(file, opened)
            if descriptor != opened:
                os.close(opened)
        return descriptor
