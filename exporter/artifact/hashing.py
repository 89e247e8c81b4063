"""Hashes the input files in the background while the tour reads the same files.

A file is hashed when the tour gets to it. So its pages come from the disk once and serve both.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HASH_CHUNK_BYTES = 1 << 22


def sha256(file: Path, *, direct: bool = False) -> str:
    """SHA-256 of a file, hexadecimal. Reads bounded chunks, the next one while this one is hashed.

    Args:
        file: the file.
        direct: read from the disk, past the page cache, if the file system can (Linux, O_DIRECT).
    """
    try:
        return _sha256(file, direct)
    except OSError as error:
        # Some file systems take the flag and then refuse the reads.
        if not direct or error.errno != errno.EINVAL:
            raise
        return _sha256(file, direct=False)


def _sha256(file: Path, direct: bool) -> str:
    digest = hashlib.sha256()
    # An anonymous mapping is aligned to pages, as direct reads require.
    buffers = [mmap.mmap(-1, HASH_CHUNK_BYTES) for _ in range(2)]
    descriptor = _open_for_hashing(file, direct)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="hash-read") as pool:
            size, offset = os.fstat(descriptor).st_size, 0
            pending = pool.submit(os.preadv, descriptor, [buffers[0]], 0)
            while offset < size:
                count = pending.result()
                if count == 0:
                    raise OSError(f"{file} was cut while it was read")
                filled, offset = buffers[0], offset + count
                buffers.reverse()
                if offset < size:
                    pending = pool.submit(os.preadv, descriptor, [buffers[0]], offset)
                with memoryview(filled) as view:
                    digest.update(view[:count])
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _open_for_hashing(file: Path, direct: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(file, flags | os.O_DIRECT)
        except OSError:
            # A file system without direct reads, such as tmpfs.
            pass
    return os.open(file, flags)


class InputHasher:
    """Hashes files one after the other in one thread, each once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashes: dict[Path, Future[str]] = {}

    def reach(self, file: Path) -> None:
        """Queue a file, if it is not queued yet."""
        if file not in self._hashes:
            self._hashes[file] = self._pool.submit(sha256, file)

    def finish(self, files: Iterable[Path]) -> dict[Path, str]:
        """Hash the rest of `files`, wait, and return the hash of each."""
        wanted = list(files)
        for file in wanted:
            self.reach(file)
        return {file: self._hashes[file].result() for file in wanted}

    def close(self) -> None:
        """Drop the files whose hashing has not begun."""
        self._pool.shutdown(cancel_futures=True)


def hash_all(folder: Path, names: Iterable[str], threads: int) -> dict[str, tuple[int, str]]:
    """Size and hash of files below `folder`, by name, several at once."""
    wanted = list(names)
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        digests = pool.map(lambda name: sha256(folder / name, direct=True), wanted)
        return {name: ((folder / name).stat().st_size, digest) for name, digest in zip(wanted, digests, strict=True)}
