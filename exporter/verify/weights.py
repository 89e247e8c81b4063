"""Reads an artifact's weights back from its files, and holds them against base and adapters, merged again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.backends.base import Backend
from exporter.backends.reading import CheckingReader, Misfits, ReadingBackend, StoredWeight, WeightReader
from exporter.errors import ArtifactError
from exporter.model import MergedModel, MergedTensor
from exporter.verify.sums import Sums, block_sums, total
from exporter.verify.weight_limits import Held, held_figures, held_survival, is_judged

if TYPE_CHECKING:
    import torch

    from exporter.merge import Merger, RowBlock

# Tensors that the verdict and the summary name.
NAMED = 5


@dataclass(frozen=True)
class WeightsResult:
    """What was found in an artifact's stored weights.

    Attributes:
        tensors: what is stored of each merged tensor, with its sums; in model order.
        faults: what is wrong with the files themselves.
        misfits: of tensors in which there are any, what no quantizer makes of the merge, by the merged tensor's name.
        held: what a weight is held to.
    """

    tensors: tuple[tuple[StoredWeight, Sums], ...]
    faults: tuple[str, ...]
    misfits: Mapping[str, Misfits] = field(default_factory=dict)
    held: Callable[[StoredWeight, Sums], Iterator[Held]] = held_figures

    @cached_property
    def total(self) -> Sums:
        """Of all tensors."""
        return total(sums for _, sums in self.tensors)

    @cached_property
    def updated(self) -> Sums:
        """Of the tensors that the adapter changes."""
        return total(sums for _, sums in self.tensors if sums.delta)

    @cached_property
    def judged(self) -> Sums:
        """Of the tensors whose survival has a limit."""
        return total(sums for weight, sums in self.tensors if is_judged(weight, sums))

    @cached_property
    def nearest(self) -> dict[str, tuple[StoredWeight, Held]]:
        """Of each measure, the weight that took the most of its limit."""
        found: dict[str, tuple[StoredWeight, Held]] = {}
        for weight, sums in self.tensors:
            for held in self.held(weight, sums):
                if held.measure not in found or held.share > found[held.measure][1].share:
                    found[held.measure] = (weight, held)
        return found

    @cached_property
    def broken(self) -> tuple[str, ...]:
        """What is wrong, in words; empty if nothing is."""
        reasons = [reason for weight, sums in self.tensors for reason in self._first_reason(weight, sums)]
        rest = len(reasons) - NAMED
        if rest > 0:
            reasons = [*reasons[:NAMED], f"so are {rest} more tensors"]
        if self.judged.delta:
            whole = held_survival(self.judged, "of the adapter's whole change")
            reasons += [] if whole.kept else [whole.reason]
        return (*self.faults, *reasons)

    def _first_reason(self, weight: StoredWeight, sums: Sums) -> Iterator[str]:
        """The first limit that a tensor breaks, in words: others and misfits follow from that; else its misfits."""
        for held in self.held(weight, sums):
            if not held.kept:
                yield held.reason
                return
        if misfits := self.misfits.get(weight.source):
            rest = misfits.count - len(misfits.named)
            more = f"; and {rest} more groups of columns" if rest else ""
            yield f"{weight.source}: {'; '.join(misfits.named)}{more}"


# Sums and misfits of some rows.
Part = tuple[Sums, Misfits]
Check = Callable[[MergedModel, WeightReader, int], WeightsResult]


def gathered(
    reader: WeightReader, parts: Iterable[tuple[str, Callable[[], Part]]], threads: int
) -> tuple[dict[str, Sums], dict[str, Misfits], tuple[str, ...]]:
    """Look at parts of stored weights on several threads, a few at a time.

    Sums are added up in the order of the parts: the figures do not depend on the number of threads.

    Args:
        reader: reads them.
        parts: the merged tensor's name, and what looks at some of its rows.
        threads: how many.

    Returns:
        Sums of each tensor, misfits of those that have any, and what is wrong with the files.
    """
    sums: dict[str, Sums] = {}
    misfits: dict[str, Misfits] = {}
    faults = list(reader.faults)
    pending: deque[tuple[str, Future[Part]]] = deque()

    def settle() -> None:
        name, future = pending.popleft()
        try:
            found, unfit = future.result()
        except ArtifactError as error:
            faults.append(f"{error.thing}: found {error.found}, expected {error.expected}")
            return
        sums[name] = sums.get(name, Sums()).plus(found)
        if unfit.count:
            misfits[name] = misfits.get(name, Misfits()).plus(unfit)

    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        for name, part in parts:
            while len(pending) >= 2 * threads:
                settle()
            pending.append((name, pool.submit(part)))
        while pending:
            settle()
    return sums, misfits, tuple(dict.fromkeys(faults))


def check_weights(model: MergedModel, reader: WeightReader, threads: int) -> WeightsResult:
    """Merge again, on the CPU, and hold what is stored against it. Memory is a few blocks a thread.

    Args:
        model: the merged model.
        reader: the artifact's weights.
        threads: threads that compute.
    """
    from exporter.merge import DEFAULT_BLOCK_BYTES, make_merger, row_blocks
    from exporter.tensor_reader import TensorReader
    from exporter.torch_threads import torch_threads_kept

    present = [tensor for tensor in model.tensors if tensor.name in reader.weights]
    with torch_threads_kept(), TensorReader() as bases:
        merger = make_merger("cpu", bases)
        check = _checker(merger, reader)

        def parts() -> Iterator[tuple[str, Callable[[], Part]]]:
            for tensor in sorted(present, key=lambda one: (str(one.source.file), one.source.start)):
                factors = merger.factors(tensor)
                for block in row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu"):
                    yield tensor.name, partial(check, tensor, block, factors)

        found, misfits, faults = gathered(reader, parts(), threads)
    whole = ((reader.weights[one.name], found[one.name].whole()) for one in present if one.name in found)
    return WeightsResult(tuple(whole), faults, misfits)


def _checker(
    merger: Merger, reader: WeightReader
) -> Callable[[MergedTensor, RowBlock, tuple[torch.Tensor, ...]], Part]:
    """Takes the sums of row blocks, and looks for misfits where the reader can, from several threads at once."""
    import torch

    from exporter.merge import Workspace, merge_noise

    workspace = Workspace()
    checking = reader if isinstance(reader, CheckingReader) else None

    def check(tensor: MergedTensor, block: RowBlock, factors: tuple[torch.Tensor, ...]) -> Part:
        weight = reader.weights[tensor.name]
        shape = (block.count, tensor.source.columns)
        base = workspace.take("base", torch.float32, shape) if tensor.updates else None
        merged = merger.block(tensor, block, factors, base=base).numpy()
        if checking is None:
            stored, misfits = reader.rows(weight, block.first, block.count), Misfits()
        else:
            stored, misfits = checking.checked_rows(weight, block.first, merged, merge_noise(tensor))
        return block_sums(stored, merged, None if base is None else base.numpy(), weight, block.first), misfits

    return check


def read_weights(
    backend: Backend | None, model: MergedModel, quant: str, entry: Path, threads: int, check: Check = check_weights
) -> WeightsResult | None:
    """Check an artifact's stored weights; None if its backend cannot read them back, or is not here.

    Args:
        backend: what wrote it; None if that is not here.
        model: the merged model.
        quant: the artifact's type, resolved.
        entry: what a runtime loads.
        threads: threads that compute.
        check: holds what is stored against what is known of the model.
    """
    if backend is None or not isinstance(backend, ReadingBackend):
        return None
    reader = backend.read(model, quant, entry)
    try:
        return check(model, reader, threads)
    finally:
        reader.close()
