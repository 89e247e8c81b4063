"""Hashes of the input files, taken in the background while the tour reads the same files.

A file is hashed when the tour gets to it, so its pages come from the disk once and serve both.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from exporter.artifact.staging import sha256


class InputHasher:
    """Hashes files one after the other in one thread, each once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashes: dict[Path, Future[str]] = {}

    def reach(self, file: Path) -> None:
        """Queue a file if it has not been yet."""
        if file not in self._hashes:
            self._hashes[file] = self._pool.submit(sha256, file)

    def finish(self, files: Iterable[Path]) -> dict[Path, str]:
        """Hash whatever is left of `files`, wait, and return the hash of each."""
        wanted = list(files)
        for file in wanted:
            self.reach(file)
        return {file: self._hashes[file].result() for file in wanted}

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(cancel_futures=True)


def hash_all(folder: Path, names: Iterable[str], threads: int) -> dict[str, tuple[int, str]]:
    """Size and hash of files below `folder`, by name, several at once."""
    wanted = list(names)
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        digests = pool.map(lambda name: sha256(folder / name, direct=True), wanted)
        return {name: ((folder / name).stat().st_size, digest) for name, digest in zip(wanted, digests, strict=True)}
