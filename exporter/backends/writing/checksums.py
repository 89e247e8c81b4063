"""Checksums of weights as their encoder left them, which a reader of the files holds against what it finds there.

A hash of a file is taken of what lies on the disk, right or wrong. These are taken before anything is packed or
written, and go with a journal's or a layer's entry over a kill, so whatever comes between is seen: a packer, an offset,
a lost write, a flipped bit. The checksum of a tensor is the CRC-32 of those of its rows, each four bytes,
little-endian, in order: rows may come and be read in any pieces. A change within 32 neighbouring bits of a row is seen
for certain, any other but for a chance of about 2^-32.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def row_checksums(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """CRC-32 of each row.

    Args:
        rows: uint8, shape (rows, bytes of a row), contiguous.
    """
    count, width = rows.shape
    data = rows.reshape(-1).data
    starts = range(0, count * width, width)
    return np.fromiter((zlib.crc32(data[at : at + width]) for at in starts), dtype="<u4", count=count)


def joined(rows: npt.NDArray[np.uint32], before: int = 0) -> int:
    """The checksum of rows that follow others.

    Args:
        rows: checksums of rows, uint32, in order.
        before: the checksum of the rows before them.
    """
    return zlib.crc32(np.ascontiguousarray(rows, dtype="<u4").data.cast("B"), before)


def as_text(checksum: int) -> str:
    """As it is written down: eight hexadecimal digits."""
    return f"{checksum:08x}"


@dataclass
class _Taken:
    """Checksums of a tensor's rows, uint32, and how many are still to come."""

    rows: npt.NDArray[np.uint32]
    left: int


class TensorChecksums:
    """Takes the rows of several tensors in any order, from several threads."""

    def __init__(self) -> None:
        self._taken: dict[str, _Taken] = {}
        self._lock = threading.Lock()

    def add(self, tensor: str, rows: int, first: int, data: npt.NDArray[np.uint8]) -> None:
        """Take some rows of a tensor.

        Args:
            tensor: its name.
            rows: how many it has in all.
            first: number of the first of these.
            data: these, as of `row_checksums`.
        """
        self.add_rows(tensor, rows, first, row_checksums(data))

    def add_rows(self, tensor: str, rows: int, first: int, found: npt.NDArray[np.uint32]) -> None:
        """Take the checksums of some rows of a tensor; see `add`."""
        with self._lock:
            if tensor not in self._taken:
                self._taken[tensor] = _Taken(np.zeros(rows, dtype="<u4"), rows)
            taken = self._taken[tensor]
            taken.rows[first : first + len(found)] = found
            taken.left -= len(found)

    def take(self, tensor: str) -> str | None:
        """The checksum of a tensor, which is forgotten with it; None if not all of its rows were taken."""
        with self._lock:
            taken = self._taken.pop(tensor, None)
        return as_text(joined(taken.rows)) if taken is not None and taken.left == 0 else None

    def take_if_whole(self, tensor: str) -> str | None:
        """Likewise; a tensor that lacks rows is not forgotten."""
        with self._lock:
            whole = tensor in self._taken and self._taken[tensor].left == 0
        return self.take(tensor) if whole else None
