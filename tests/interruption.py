"""Runs of the command line in processes of their own that are slow enough to be stopped in the middle."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
# Imported once by the server that the processes are forked from, so that each starts at once.
PRELOADED = [
    "torch",
    "exporter.cli.app",
    "exporter.pipeline.export",
    "exporter.merge.merger",
    "exporter.tour.stream",
    "tests.interruption",
]


class SlowRun:
    """`exporter …` in a process of its own, with a pause at every block of rows and every small file.

    Args:
        arguments: of the command line.
        folder: where its log and the list of tensors that it merged go.
    """

    def __init__(self, arguments: Sequence[str | Path], folder: Path, pause: float = 0.01) -> None:
        self.log, self.merged = folder / "log", folder / "merged"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        texts = [str(argument) for argument in arguments]
        self.process = context.Process(target=_main, args=(texts, str(self.log), str(self.merged), pause))
        self.process.start()

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end; returns the exit status (negative: the signal)."""
        self.process.join(timeout)
        status = self.process.exitcode
        assert status is not None, f"still running: {self.log.read_text()}"
        return status

    def wait_until(self, staging: Path, tensors: int) -> None:
        """Wait until the journal of a staging folder names so many tensors (0: until the folder is there)."""
        deadline = time.monotonic() + 60
        while not (staging / "files").is_dir() or journaled(staging) < tensors:
            assert self.process.exitcode is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, number)


def journaled(staging: Path) -> int:
    """Number of tensors that the journal names."""
    journal = staging / "journal"
    return len({line for line in journal.read_text().splitlines() if line}) if journal.is_file() else 0


def _main(arguments: list[str], log: str, merged: str, pause: float) -> None:
    from exporter.artifact import durable
    from exporter.cli.app import app
    from exporter.pipeline import publish
    from exporter.tour import stream

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    offer, write, copy = stream._merge_block, durable.write_durably, durable.copy_durably

    def slow_offer(merger: Any, tensor: Any, *rest: Any) -> None:
        with open(merged, "a") as names:
            names.write(f"{tensor.name}\n")
        time.sleep(pause)
        offer(merger, tensor, *rest)

    def slow_write(file: Path, content: bytes) -> None:
        write(file, content[: len(content) // 2])
        time.sleep(pause)
        write(file, content)

    def slow_copy(source: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        time.sleep(pause)
        copy(source, target)

    # Every tensor is brought to the disk by itself, as the large ones of a real model are.
    patch.multiple(stream, SYNC_BYTES=1, _merge_block=slow_offer).start()
    patch.multiple(publish, write_durably=slow_write, copy_durably=slow_copy).start()
    app(arguments)
