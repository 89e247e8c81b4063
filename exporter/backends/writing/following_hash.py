"""SHA-256 of a file while it is being written, behind the writer, so that its pages are still in memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from exporter.backends.output_plan import TensorPlan


class FollowingHash:
    """Hashes one file from its start to the first tensor that is not written yet, again and again.

    Args:
        descriptor: the file, open for reading; the caller keeps it open.
        nbytes: the file's size.
        tensors: the tensors in it; whatever lies before and between them must be written already.
        pool: one thread, which may serve several files.
        buffer: what that thread reads into.
    """

    def __init__(
        self, descriptor: int, nbytes: int, tensors: Iterable[TensorPlan], pool: ThreadPoolExecutor, buffer: bytearray
    ) -> None:
        self._descriptor = descriptor
        self._pool = pool
        self._buffer = memoryview(buffer)
        self._nbytes = nbytes
        ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
        self._starts = [tensor.offset for tensor in ordered] + [nbytes]
        self._rows_left = {tensor.name: tensor.rows if tensor.nbytes else 0 for tensor in ordered}
        self._names = [tensor.name for tensor in ordered]
        self._next = 0
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self.hashed = 0

    def wrote(self, tensor: TensorPlan, rows: int) -> None:
        """Note rows as written. Called from several threads."""
        with self._lock:
            self._rows_left[tensor.name] -= rows
            before = self._next
            while self._next < len(self._names) and self._rows_left[self._names[self._next]] == 0:
                self._next += 1
            if self._next > before:
                self._pool.submit(self._advance, self._starts[self._next])

    def finish(self) -> str:
        """Hash the rest, wherever it came from, and return the hexadecimal hash. The file must be complete."""
        self._pool.submit(self._advance, self._nbytes).result()
        return self._digest.hexdigest()

    def _advance(self, end: int) -> None:
        while self.hashed < end:
            chunk = self._buffer[: end - self.hashed]
            count = os.preadv(self._descriptor, [chunk], self.hashed)
            if count == 0:
                raise OSError(f"a file ends at byte {self.hashed} of {self._nbytes}")
            self._digest.update(chunk[:count])
            self.hashed += count
