"""Hidden states of all windows between two layers: in memory, or in a file where they would not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Windows of one length that travel together.

    Attributes:
        name: `evaluation` or `calibration`.
        ids: token ids, shape (windows, tokens).
    """

    name: str
    ids: Ids

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.ids.shape[1])

    def batches(self, tokens: int) -> Iterator[slice]:
        """Micro-batches of at most `tokens` tokens, but of one window at least."""
        size = max(1, tokens // self.length)
        for first in range(0, self.windows, size):
            yield slice(first, min(first + size, self.windows))


class States:
    """Hidden states of one group, shape (windows, tokens, hidden); a layer's output replaces its input in place.

    Args:
        group: the windows.
        hidden: elements of a hidden state.
        dtype: what they are kept in.
        file: keep them in this file instead of in memory.
    """

    def __init__(self, group: Group, hidden: int, dtype: torch.dtype, file: Path | None = None) -> None:
        self.group = group
        shape = (group.windows, group.length, hidden)
        self._data: torch.Tensor | None = None
        self._file = file
        if file is None:
            self._data = torch.zeros(shape, dtype=dtype)
        else:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._shape, self._dtype = shape, dtype
        self.hidden = hidden

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def read(self, windows: slice) -> torch.Tensor:
        """Hidden states of some windows, on the CPU."""
        if self._data is not None:
            return self._data[windows]
        _, length, hidden = self._shape
        wanted = torch.empty((windows.stop - windows.start, length, hidden), dtype=self._dtype)
        view = _bytes(wanted)
        start = windows.start * length * hidden * self._dtype.itemsize
        read = 0
        while read < len(view):
            read += os.preadv(self._descriptor, [view[read:]], start + read)
        return wanted

    def write(self, windows: slice, hidden: torch.Tensor) -> None:
        """Replace the hidden states of some windows."""
        if self._data is not None:
            self._data[windows] = hidden
            return
        data = hidden.to("cpu", self._dtype).contiguous()
        view = _bytes(data)
        start = windows.start * self._shape[1] * self._shape[2] * self._dtype.itemsize
        written = 0
        while written < len(view):
            written += os.pwrite(self._descriptor, view[written:], start + written)

    def save(self, file: Path) -> None:
        """Write everything to a file and bring it to the disk."""
        with file.open("wb") as stream:
            for windows in self.group.batches(4096):
                stream.write(_bytes(self.read(windows).contiguous()))
            stream.flush()
            os.fsync(stream.fileno())

    def load(self, file: Path) -> None:
        """Read what `save` wrote.

        Raises:
            OSError: the file is not of this size.
        """
        if file.stat().st_size != self.nbytes:
            raise OSError(f"{file.name} has {file.stat().st_size} bytes, not {self.nbytes}")
        _, length, hidden = self._shape
        with file.open("rb") as stream:
            for windows in self.group.batches(4096):
                shape = (windows.stop - windows.start, length, hidden)
                raw = bytearray(stream.read(int(np.prod(shape)) * self._dtype.itemsize))
                self.write(windows, torch.frombuffer(raw, dtype=self._dtype).view(shape))

    def close(self) -> None:
        """Give the memory, or the file, back."""
        if self._file is not None:
            os.close(self._descriptor)
            self._file.unlink(missing_ok=True)
            self._file = None
        self._data = None


def _bytes(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return values.view(torch.uint8).numpy().data.cast("B")
