"""Merged tensors as row blocks, offered to every artifact that stores them.

Blocks are merged, encoded and written by worker threads; the heavy calls (reads, torch, ggml, writes) release the GIL.
How many blocks are under way is bounded, so memory does not grow with the model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import Piece
from exporter.inputs.row_blocks import RowBlock, row_blocks
from exporter.merge.merger import Factors, Merger, check_finite
from exporter.merge.model import MergedModel, MergedTensor
from exporter.tour.riders import Rider

# Written bytes after which the disk is made to catch up and the journal says so.
SYNC_BYTES = 64 << 20


@dataclass(frozen=True)
class Progress:
    """Called as the tour goes.

    Attributes:
        read: bytes of the base that were merged and offered.
        reached: called with each file of the base when the tour gets to it.
    """

    read: Callable[[int], None] = lambda _: None
    reached: Callable[[Path], None] = lambda _: None


@dataclass(frozen=True)
class Target:
    """Memory that a tensor's values go to as well.

    Attributes:
        values: any float dtype and device, of the tensor's shape.
        merged: whether it takes the merged values or the base's own.
    """

    values: torch.Tensor
    merged: bool


@dataclass(frozen=True)
class Taker:
    """A stored tensor that takes rows of a merged one.

    Attributes:
        rider: the artifact.
        plan: the stored tensor.
        piece: the rows, and where they go.
    """

    rider: Rider
    plan: TensorPlan
    piece: Piece


class Stream:
    """Merges tensors as row blocks in worker threads, and offers each block to the riders that store it.

    Args:
        model: the merged model.
        riders: the artifacts that are written.
        merger: computes the blocks.
        threads: threads that compute.
        block_bytes: float32 bytes of a block.
        progress: told what is read.
    """

    def __init__(
        self,
        model: MergedModel,
        riders: Sequence[Rider],
        merger: Merger,
        *,
        threads: int,
        block_bytes: int,
        progress: Progress,
    ) -> None:
        self.merger = merger
        self._shards = {file: number for number, file in enumerate(model.base.shards)}
        self._riders = riders
        self._done = {rider: rider.staging.done(rider.label) for rider in riders}
        self._lock = threading.Lock()
        self._threads, self._block_bytes, self._progress = threads, block_bytes, progress
        self._commits = _Commits(riders)
        self._left = {tensor.name: tensor.source.nbytes for tensor in model.tensors}
        # One more than computes, since at any time one may wait for the disk.
        self._pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="merge")

    def offer(
        self,
        tensors: Iterable[MergedTensor],
        riders: Iterable[Rider] | None = None,
        targets: Mapping[str, Target] | None = None,
    ) -> None:
        """Offer tensors to every rider that stores them and does not have them yet, and to the targets.

        May be called from several threads; one is served after the other.

        Args:
            tensors: what to merge; they are read in the order of their files.
            riders: the artifacts to offer to; None for all.
            targets: memory by tensor name; every one is filled when this returns.

        Raises:
            NonFiniteTensorError: a merged tensor holds NaN or infinity.
            ExporterError: whatever a writer raised.
        """
        with self._lock:
            self._offer(tensors, self._riders if riders is None else list(riders), targets or {})

    def _offer(self, tensors: Iterable[MergedTensor], riders: Sequence[Rider], targets: Mapping[str, Target]) -> None:
        _await_memory(targets.values())
        pending: deque[tuple[Future[None], MergedTensor, list[Taker], int]] = deque()
        try:
            for tensor in sorted(tensors, key=lambda one: (self._shards[one.source.file], one.source.start)):
                self._progress.reached(tensor.source.file)
                takers = [
                    Taker(rider, plan, piece)
                    for rider in riders
                    for plan, piece in rider.tensors.get(tensor.name, ())
                    if plan.name not in self._done[rider]
                ]
                target = targets.get(tensor.name)
                if not takers and target is None:
                    self._read(tensor, tensor.source.nbytes)
                    continue
                factors = self.merger.factors(tensor) if takers or (target and target.merged) else ()
                blocks = list(row_blocks(tensor.source, self._block_bytes, self.merger.device))
                for block in blocks:
                    while len(pending) >= 2 * self._threads:
                        self._settle(pending)
                    finished = takers if block is blocks[-1] else []
                    job = self._pool.submit(_merge_block, self.merger, tensor, block, factors, takers, target)
                    pending.append((job, tensor, finished, block.count * tensor.source.row_bytes))
            while pending:
                self._settle(pending)
        except BaseException:
            for job, *_ in pending:
                job.cancel()
            raise

    def finish(self) -> None:
        """Bring everything that was offered to the disk and note it in the journals."""
        with self._lock:
            self._commits.finish()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._commits.close()

    def _settle(self, pending: deque[tuple[Future[None], MergedTensor, list[Taker], int]]) -> None:
        future, tensor, finished, nbytes = pending.popleft()
        future.result()
        self._read(tensor, nbytes)
        if finished:
            self._commits.add(finished)

    def _read(self, tensor: MergedTensor, nbytes: int) -> None:
        """Count every byte of a tensor once, however often it is offered."""
        nbytes = min(nbytes, self._left[tensor.name])
        self._left[tensor.name] -= nbytes
        if nbytes:
            self._progress.read(nbytes)


def _await_memory(targets: Iterable[Target]) -> None:
    """Wait until nothing that this thread's stream has queued uses the targets' memory under its earlier owner: they
    are filled on other streams."""
    for device in {target.values.device for target in targets}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _merge_block(
    merger: Merger,
    tensor: MergedTensor,
    block: RowBlock,
    factors: Factors,
    takers: list[Taker],
    target: Target | None,
) -> None:
    """Merge one block, and hand it to the target and to every stored tensor that takes rows of it."""
    rows = target.values.view(tensor.source.rows, -1)[block.first : block.first + block.count] if target else None
    wants_base = target is not None and not target.merged
    if wants_base and not takers:
        tensor, factors = replace(tensor, updates=()), ()
    with merger.on_device():
        merged = merger.block(tensor, block, factors, base=rows if wants_base else None)
        # Wherever the base is not finite, the sum is not either.
        check_finite(tensor, merged)
        if rows is not None and not wants_base:
            rows.copy_(merged)
        for taker in takers:
            values = taker.plan.arrangement.apply(merged)
            for run in taker.piece.inside(block.first, block.count):
                rows = values[run.source - block.first :][: run.count]
                taker.rider.writer.write(taker.plan, run.stored, rows)


class _Commits:
    """Collects finished tensors and, every so many bytes, syncs the writers and notes the tensors in the journals.

    That happens in a thread of its own, one commit at a time, so that merging goes on meanwhile.
    """

    def __init__(self, riders: Sequence[Rider]) -> None:
        self._riders = riders
        self._waiting: list[tuple[Rider, str]] = []
        self._missing = {(rider, plan.name): set(plan.sources) for rider in riders for plan in rider.plans}
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._last: Future[None] | None = None

    def add(self, takers: Sequence[Taker]) -> None:
        """All rows that these take of a merged tensor are written; what has all of its pieces is finished."""
        for taker in takers:
            missing = self._missing[taker.rider, taker.plan.name]
            missing.discard(taker.piece.source)
            if not missing:
                self._waiting.append((taker.rider, taker.plan.name))
                self._bytes += taker.plan.nbytes
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

    def _commit(self, waiting: list[tuple[Rider, str]]) -> None:
        for rider in self._riders:
            if stored := [name for owner, name in waiting if owner is rider]:
                rider.writer.sync()
                rider.staging.record((rider.label, name, rider.writer.checksum(name)) for name in stored)
