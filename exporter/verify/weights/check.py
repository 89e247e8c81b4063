"""Reads an artifact's weights back from its files, and holds them against base and adapters, merged again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.backends.base import Backend
from exporter.backends.pieces import RowRun
from exporter.backends.weight_reader import ImpossibleGroups, StoredRows, StoredWeight, WeightReader
from exporter.backends.writing.checksums import TensorChecksums, row_checksums
from exporter.errors import ArtifactError
from exporter.merge.model import MergedModel, MergedTensor
from exporter.verify.weights.limits import LimitCheck, figure_checks, is_judged, survival_check
from exporter.verify.weights.sums import Sums, block_sums, total

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from exporter.inputs.row_blocks import RowBlock
    from exporter.merge.merger import Factors, Merger


# Tensors that the verdict and the summary name.
NAMED = 5


@dataclass(frozen=True)
class WeightsResult:
    """What was found in an artifact's stored weights.

    Attributes:
        tensors: what is stored of each merged tensor, with its sums; in model order.
        faults: what is wrong with the files themselves.
        impossible_groups: groups of columns that no quantizer makes of the merge, by the key of the stored weight; only
            of weights that have any.
        altered: tensors that are not stored as they were encoded, in order, by the name that their checksum goes by.
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
        if impossible_groups := self.impossible_groups.get(weight.key):
            rest = impossible_groups.count - len(impossible_groups.named)
            more = f"; and {rest} more groups of columns" if rest else ""
            yield f"{weight.source}: {'; '.join(impossible_groups.named)}{more}"
        elif weight.checksum_name in self.altered:
            yield f"{weight.checksum_name} is not stored as it was encoded: its checksum is another than the export's"


@dataclass(frozen=True)
class Part:
    """What was found in some rows of a stored weight.

    Attributes:
        weight: the weight.
        stored: number of the first row in the stored tensor.
        sums: their sums.
        impossible_groups: what in them no quantizer makes of the merge.
        checksums: of the rows, uint32 (`exporter.backends.writing.checksums`); None if there is nothing to hold them
            against.
    """

    weight: StoredWeight
    stored: int
    sums: Sums
    impossible_groups: ImpossibleGroups
    checksums: npt.NDArray[np.uint32] | None

    @classmethod
    def of(
        cls,
        weight: StoredWeight,
        run: RowRun,
        rows: StoredRows,
        sums: Sums,
        impossible_groups: ImpossibleGroups,
        *,
        checked: bool,
    ) -> Part:
        """Of rows that were read; with `checked`, their checksums are taken."""
        encoded = rows.encoded if checked else None
        checksums = None if encoded is None else row_checksums(encoded)
        return cls(weight, run.stored, sums, impossible_groups, checksums)


@dataclass
class Gathered:
    """What was found in the stored weights, by their keys, and what is wrong with the files.

    Checksums are by the name that a tensor's goes by, and of the tensors whose rows have all been read.
    """

    faults: list[str]
    sums: dict[str, Sums] = field(default_factory=dict)
    impossible_groups: dict[str, ImpossibleGroups] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    _taken: TensorChecksums = field(default_factory=TensorChecksums)

    def add(self, part: Part) -> None:
        """Take rows of a weight; sums are added in the order in which they come."""
        key, name = part.weight.key, part.weight.checksum_name
        self.sums[key] = self.sums.get(key, Sums()).plus(part.sums)
        if part.impossible_groups.count:
            before = self.impossible_groups.get(key, ImpossibleGroups())
            self.impossible_groups[key] = before.plus(part.impossible_groups)
        if part.checksums is not None:
            self._taken.add_rows(name, part.weight.rows, part.stored, part.checksums)
            if checksum := self._taken.take_if_whole(name):
                self.checksums[name] = checksum

    def result(
        self,
        tensors: Iterable[tuple[StoredWeight, Sums]],
        expected: Mapping[str, str],
        checks: Callable[[StoredWeight, Sums], Iterator[LimitCheck]] = figure_checks,
    ) -> WeightsResult:
        """All of it.

        Args:
            tensors: of each tensor, in model order, its whole sums.
            expected: checksums by the name that a tensor's goes by.
            checks: see `WeightsResult`.
        """
        altered = tuple(name for name, found in self.checksums.items() if found != expected[name])
        faults = tuple(dict.fromkeys(self.faults))
        return WeightsResult(tuple(tensors), faults, self.impossible_groups, altered, len(self.checksums), checks)


Check = Callable[[MergedModel, WeightReader, int, Mapping[str, str]], WeightsResult]


def gathered(reader: WeightReader, parts: Iterable[Callable[[], list[Part]]], threads: int) -> Gathered:
    """Look at parts of stored weights on several threads, a few at a time.

    Sums are added up in the order of the parts: the figures do not depend on the number of threads.

    Args:
        reader: reads them.
        parts: each looks at some rows of a merged tensor, wherever they are stored; those of a tensor in order.
        threads: how many.
    """
    found = Gathered(list(reader.faults))
    pending: deque[Future[list[Part]]] = deque()

    def settle() -> None:
        try:
            for part in pending.popleft().result():
                found.add(part)
        except ArtifactError as error:
            found.faults.append(f"{error.thing}: found {error.found}, expected {error.expected}")

    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        for part in parts:
            while len(pending) >= 2 * threads:
                settle()
            pending.append(pool.submit(part))
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
        checksums: of its tensors as they were encoded, by `StoredWeight.checksum_name`, as far as they are known.
    """
    from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES, row_blocks
    from exporter.inputs.tensor_reader import TensorReader
    from exporter.libraries.torch_threads import torch_threads_kept
    from exporter.merge.device import make_merger

    stored = by_source(reader)
    present = [tensor for tensor in model.tensors if tensor.name in stored]
    with torch_threads_kept(), TensorReader() as bases:
        merger = make_merger("cpu", bases)
        known = checksums or {}
        check = _checker(merger, reader, stored, known)

        def parts() -> Iterator[Callable[[], list[Part]]]:
            for tensor in sorted(present, key=lambda one: (str(one.source.file), one.source.start)):
                factors = merger.factors(tensor)
                for block in row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu"):
                    yield partial(check, tensor, block, factors)

        found = gathered(reader, parts(), threads)
    sums = found.sums
    weights = [weight for tensor in present for weight in stored[tensor.name]]
    return found.result(((one, sums[one.key].whole()) for one in weights if one.key in sums), known)


def by_source(reader: WeightReader) -> dict[str, list[StoredWeight]]:
    """What is stored of each merged tensor, by its name."""
    found: dict[str, list[StoredWeight]] = {}
    for weight in reader.weights.values():
        found.setdefault(weight.source, []).append(weight)
    return found


def _checker(
    merger: Merger, reader: WeightReader, stored: Mapping[str, Sequence[StoredWeight]], checksums: Mapping[str, str]
) -> Callable[[MergedTensor, RowBlock, Factors], list[Part]]:
    """Takes the sums of row blocks, and has the reader look for impossible groups. Used by several threads."""
    import torch

    from exporter.inputs.row_blocks import Workspace
    from exporter.merge.merger import merge_noise

    workspace = Workspace()

    def check(tensor: MergedTensor, block: RowBlock, factors: Factors) -> list[Part]:
        shape = (block.count, tensor.source.columns)
        base = workspace.take("base", torch.float32, shape) if tensor.updates else None
        merged = merger.block(tensor, block, factors, base=base)
        noise = merge_noise(tensor)
        return [
            look(weight, run, merged[first : first + run.count], None if base is None else base[first:], noise)
            for weight in stored[tensor.name]
            for run in weight.inside(block.first, block.count)
            for first in (run.source - block.first,)
        ]

    def look(weight: StoredWeight, run: RowRun, merged: torch.Tensor, base: torch.Tensor | None, noise: float) -> Part:
        wanted = weight.arrangement.apply(merged).numpy()
        before = None if base is None else weight.arrangement.apply(base[: run.count]).numpy()
        rows = reader.rows(weight, run.stored, run.count)
        impossible_groups = reader.impossible_groups(weight, run.stored, rows, wanted, noise)
        sums = block_sums(rows.values, wanted, before, weight, run.source)
        return Part.of(weight, run, rows, sums, impossible_groups, checked=weight.checksum_name in checksums)

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
    reader = None if backend is None else backend.read(model, quant, entry)
    if reader is None:
        return None
    try:
        return check(model, reader, threads, checksums)
    finally:
        reader.close()
