"""The walk without activations: every tensor once, as row blocks offered to every artifact.

Blocks are merged, encoded and written by worker threads; the heavy calls (reads, torch, ggml, writes) release the GIL.
How many blocks are under way is bounded, so memory does not grow with the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.artifact.staging import Staging
from exporter.backends.base import TensorPlan, Writer
from exporter.merge import Merger, RowBlock, check_finite, row_blocks
from exporter.model import MergedModel, MergedTensor

# Written bytes after which the disk is made to catch up and the journal says so.
SYNC_BYTES = 64 << 20


@dataclass(frozen=True)
class Rider:
    """One artifact on the tour.

    Attributes:
        label: its name in the journal.
        tensors: its stored tensors by the name of the merged tensor they are made from.
        writer: where its rows go.
        staging: the folder that it is written under.
    """

    label: str
    tensors: dict[str, TensorPlan]
    writer: Writer
    staging: Staging


@dataclass(frozen=True)
class Progress:
    """Called as the tour goes.

    Attributes:
        read: bytes of the base that were merged and offered.
        reached: called with each file of the base when the tour gets to it.
    """

    read: Callable[[int], None] = lambda _: None
    reached: Callable[[Path], None] = lambda _: None


def stream(
    model: MergedModel, riders: Sequence[Rider], merger: Merger, *, threads: int, block_bytes: int, progress: Progress
) -> None:
    """Offer every merged tensor to every rider that stores it and does not have it yet.

    Raises:
        NonFiniteTensorError: a merged tensor holds NaN or infinity.
        ExporterError: whatever a writer raised.
    """
    shards = {file: number for number, file in enumerate(model.base.shards)}
    done = {rider.label: rider.staging.done(rider.label) for rider in riders}
    commits = _Commits(riders)
    pending: deque[tuple[Future[None], MergedTensor | None, int]] = deque()

    def settle() -> None:
        future, finished, nbytes = pending.popleft()
        future.result()
        progress.read(nbytes)
        if finished is not None:
            commits.add(finished)

    # One more than computes, since at any time one may wait for the disk.
    pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="merge")
    try:
        # Without activations any order does; the order of the files is the one in which disks like to read and write.
        for tensor in sorted(model.tensors, key=lambda tensor: (shards[tensor.source.file], tensor.source.start)):
            progress.reached(tensor.source.file)
            takers = [rider for rider in riders if tensor.name in rider.tensors]
            takers = [rider for rider in takers if rider.tensors[tensor.name].name not in done[rider.label]]
            if not takers:
                progress.read(tensor.source.nbytes)
                continue
            factors = merger.factors(tensor)
            blocks = list(row_blocks(tensor.source, block_bytes, merger.device))
            for block in blocks:
                while len(pending) >= 2 * threads:
                    settle()
                finished = tensor if block is blocks[-1] else None
                job = pool.submit(_offer, merger, tensor, block, factors, takers)
                pending.append((job, finished, block.count * tensor.source.row_bytes))
        while pending:
            settle()
        commits.finish()
    finally:
        pool.shutdown(cancel_futures=True)
        commits.close()


def _offer(
    merger: Merger, tensor: MergedTensor, block: RowBlock, factors: tuple[torch.Tensor, ...], takers: list[Rider]
) -> None:
    """Merge one block and hand it to every rider that takes it."""
    merged = merger.block(tensor, block, factors)
    check_finite(tensor, merged)
    for rider in takers:
        rider.writer.write(rider.tensors[tensor.name], block.first, merged)


class _Commits:
    """Collects finished tensors and, every so many bytes, syncs the writers and notes the tensors in the journals.

    That happens in a thread of its own, one commit at a time, so that merging goes on meanwhile.
    """

    def __init__(self, riders: Sequence[Rider]) -> None:
        self._riders = riders
        self._waiting: list[str] = []
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._last: Future[None] | None = None

    def add(self, tensor: MergedTensor) -> None:
        self._waiting.append(tensor.name)
        self._bytes += sum(rider.tensors[tensor.name].nbytes for rider in self._riders if tensor.name in rider.tensors)
        if self._bytes >= SYNC_BYTES:
            self._begin()

    def finish(self) -> None:
        self._begin()
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        self._pool.shutdown()

    def _begin(self) -> None:
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._commit, self._waiting)
        self._waiting, self._bytes = [], 0

    def _commit(self, names: list[str]) -> None:
        for rider in self._riders:
            if stored := [rider.tensors[name].name for name in names if name in rider.tensors]:
                rider.writer.sync()
                rider.staging.record((rider.label, name) for name in stored)
