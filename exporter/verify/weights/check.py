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
from exporter.backends.weight_reader import (
    CheckingReader,
    ImpossibleGroups,
    ReadingBackend,
    StoredRows,
    StoredWeight,
    WeightReader,
)
from exporter.backends.writing.checksums import as_text, joined, row_checksums
from exporter.errors import ArtifactError
from exporter.merge.model import MergedModel, MergedTensor
from exporter.verify.weights.limits import LimitCheck, figure_checks, is_judged, survival_check
from exporter.verify.weights.sums import Sums, block_sums, total

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from exporter.inputs.row_blocks import RowBlock
    from exporter.merge.merger import Merger


# Tensors that the verdict and the summary name.
NAMED = 5


@dataclass(frozen=True)
class WeightsResult:
    """What was found in an artifact's stored weights.

    Attributes:
        tensors: what is stored of each merged tensor, with its sums; in model order.
        faults: what is wrong with the files themselves.
        impossible_groups: groups of columns that no quantizer makes of the merge, by the merged tensor's name; only of
            tensors that have any.
        altered: merged tensors that are not stored as they were encoded, in order.
        checked: of how many tensors that is known.
        checks: the limits of a weight, each with the figure that it bounds.
    """

    tensors: tuple[tuple[StoredWeight, Sums], ...]
    faults: tuple[str, ...]
    impossible_groups: Mapping[str, ImpossibleGroups] = field(default_factory=dict)
    altered: tuple[str, ...] = ()
    checked: int = 0
    checks: Callable[[StoredWeight, Sums], Iterator[LimitCheck]] = figure_checks

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
    def nearest(self) -> dict[str, tuple[StoredWeight, LimitCheck]]:
        """Of each measure, the weight that took the most of its limit."""
        found: dict[str, tuple[StoredWeight, LimitCheck]] = {}
        for weight, sums in self.tensors:
            for check in self.checks(weight, sums):
                if check.measure not in found or check.share > found[check.measure][1].share:
                    found[check.measure] = (weight, check)
        return found

    @cached_property
    def broken(self) -> tuple[str, ...]:
        """What is wrong, in words; empty if nothing is."""
        reasons = [reason for weight, sums in self.tensors for reason in self._first_reason(weight, sums)]
        rest = len(reasons) - NAMED
        if rest > 0:
            reasons = [*reasons[:NAMED], f"so are {rest} more tensors"]
        if self.judged.delta:
            whole = survival_check(self.judged, "of the adapter's whole change")
            reasons += [] if whole.kept else [whole.reason]
        return (*self.faults, *reasons)

    def _first_reason(self, weight: StoredWeight, sums: Sums) -> Iterator[str]:
        """The first limit that a tensor breaks, in words; else its impossible groups, else its checksum.

        The later ones follow from the earlier.
        """
        for check in self.checks(weight, sums):
            if not check.kept:
                yield check.reason
                return
        if impossible_groups := self.impossible_groups.get(weight.source):
            rest = impossible_groups.count - len(impossible_groups.named)
            more = f"; and {rest} more groups of columns" if rest else ""
            yield f"{weight.source}: {'; '.join(impossible_groups.named)}{more}"
        elif weight.source in self.altered:
            yield f"{weight.source} is not stored as it was encoded: its checksum is another than the export's"


@dataclass(frozen=True)
class Part:
    """What was found in some rows of a tensor.

    Attributes:
        sums: their sums.
        impossible_groups: what in them no quantizer makes of the merge.
        checksums: of the rows, uint32 (`exporter.backends.writing.checksums`); None if there is nothing to hold them
            against.
    """

    sums: Sums
    impossible_groups: ImpossibleGroups
    checksums: npt.NDArray[np.uint32] | None

    @classmethod
    def of(cls, stored: StoredRows, sums: Sums, impossible_groups: ImpossibleGroups, *, checked: bool) -> Part:
        """Of rows that were read; with `checked`, their checksums are taken."""
        encoded = stored.encoded if checked else None
        return cls(sums, impossible_groups, None if encoded is None else row_checksums(encoded))


@dataclass
class Gathered:
    """What was found in the stored weights, by the merged tensor's name, and what is wrong with the files."""

    faults: list[str]
    sums: dict[str, Sums] = field(default_factory=dict)
    impossible_groups: dict[str, ImpossibleGroups] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, part: Part) -> None:
        """Take the rows of a tensor that follow those before."""
        self.sums[name] = self.sums.get(name, Sums()).plus(part.sums)
        if part.impossible_groups.count:
            self.impossible_groups[name] = self.impossible_groups.get(name, ImpossibleGroups()).plus(
                part.impossible_groups
            )
        if part.checksums is not None:
            self.checksums[name] = joined(part.checksums, self.checksums.get(name, 0))

    def result(
        self,
        tensors: Iterable[tuple[StoredWeight, Sums]],
        expected: Mapping[str, str],
        checks: Callable[[StoredWeight, Sums], Iterator[LimitCheck]] = figure_checks,
    ) -> WeightsResult:
        """All of it.

        Args:
            tensors: of each tensor, in model order, its whole sums.
            expected: checksums by the merged tensor's name.
            checks: see `WeightsResult`.
        """
        altered = tuple(name for name, found in self.checksums.items() if as_text(found) != expected[name])
        faults = tuple(dict.fromkeys(self.faults))
        return WeightsResult(tuple(tensors), faults, self.impossible_groups, altered, len(self.checksums), checks)


Check = Callable[[MergedModel, WeightReader, int, Mapping[str, str]], WeightsResult]


def gathered(reader: WeightReader, parts: Iterable[tuple[str, Callable[[], Part]]], threads: int) -> Gathered:
    """Look at parts of stored weights on several threads, a few at a time.

    Sums are added up in the order of the parts: the figures do not depend on the number of threads.

    Args:
        reader: reads them.
        parts: the merged tensor's name, and what looks at some of its rows; those of a tensor in order.
        threads: how many.
    """
    found = Gathered(list(reader.faults))
    pending: deque[tuple[str, Future[Part]]] = deque()

    def settle() -> None:
        name, future = pending.popleft()
        try:
            found.add(name, future.result())
        except ArtifactError as error:
            found.faults.append(f"{error.thing}: found {error.found}, expected {error.expected}")

    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        for name, part in parts:
            while len(pending) >= 2 * threads:
                settle()
            pending.append((name, pool.submit(part)))
        while pending:
            settle()
    return found


def check_weights(
    model: MergedModel, reader: WeightReader, threads: int, checksums: Mapping[str, str] | None = None
) -> WeightsResult:
    """Merge again, on the CPU, and hold what is stored against it. Memory is a few blocks a thread.

    Args:
        model: the merged model.
        reader: the artifact's weights.
        threads: threads that compute.
        checksums: of its tensors as they were encoded, by the merged tensor's name, as far as they are known.
    """
    from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES, row_blocks
    from exporter.inputs.tensor_reader import TensorReader
    from exporter.libraries.torch_threads import torch_threads_kept
    from exporter.merge.device import make_merger

    present = [tensor for tensor in model.tensors if tensor.name in reader.weights]
    with torch_threads_kept(), TensorReader() as bases:
        merger = make_merger("cpu", bases)
        known = checksums or {}
        check = _checker(merger, reader, known)

        def parts() -> Iterator[tuple[str, Callable[[], Part]]]:
            for tensor in sorted(present, key=lambda one: (str(one.source.file), one.source.start)):
                factors = merger.factors(tensor)
                for block in row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu"):
                    yield tensor.name, partial(check, tensor, block, factors)

        found = gathered(reader, parts(), threads)
    sums = found.sums
    whole = ((reader.weights[one.name], sums[one.name].whole()) for one in present if one.name in sums)
    return found.result(whole, known)


def _checker(
    merger: Merger, reader: WeightReader, checksums: Mapping[str, str]
) -> Callable[[MergedTensor, RowBlock, tuple[torch.Tensor, ...]], Part]:
    """Takes the sums of row blocks, and looks for impossible groups where the reader can. Used by several threads."""
    import torch

    from exporter.inputs.row_blocks import Workspace
    from exporter.merge.merger import merge_noise

    workspace = Workspace()
    checking = reader if isinstance(reader, CheckingReader) else None

    def check(tensor: MergedTensor, block: RowBlock, factors: tuple[torch.Tensor, ...]) -> Part:
        weight = reader.weights[tensor.name]
        shape = (block.count, tensor.source.columns)
        base = workspace.take("base", torch.float32, shape) if tensor.updates else None
        merged = merger.block(tensor, block, factors, base=base).numpy()
        stored, impossible_groups = reader.rows(weight, block.first, block.count), ImpossibleGroups()
        if checking is not None:
            impossible_groups = checking.impossible_groups(weight, block.first, stored, merged, merge_noise(tensor))
        sums = block_sums(stored.values, merged, None if base is None else base.numpy(), weight, block.first)
        return Part.of(stored, sums, impossible_groups, checked=tensor.name in checksums)

    return check


def read_weights(
    backend: Backend | None,
    model: MergedModel,
    quant: str,
    entry: Path,
    threads: int,
    checksums: Mapping[str, str],
    check: Check = check_weights,
) -> WeightsResult | None:
    """Check an artifact's stored weights; None if its backend cannot read them back, or is not here.

    Args:
        backend: what wrote it; None if that is not here.
        model: the merged model.
        quant: the artifact's type, resolved.
        entry: what a runtime loads.
        threads: threads that compute.
        checksums: see `check_weights`.
        check: holds what is stored against what is known of the model.
    """
    if backend is None or not isinstance(backend, ReadingBackend):
        return None
    reader = backend.read(model, quant, entry)
    try:
        return check(model, reader, threads, checksums)
    finally:
        reader.close()
