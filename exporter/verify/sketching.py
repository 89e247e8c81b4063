"""Sketches of the weights taken from base and adapters, and held against what an artifact stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from exporter.backends.reading import Misfits, WeightReader
from exporter.errors import UnsupportedModelError
from exporter.merge import DEFAULT_BLOCK_BYTES, RowBlock, Workspace, make_merger, row_blocks
from exporter.model import MergedModel, MergedTensor
from exporter.reporter import Reporter
from exporter.tensor_reader import TensorReader
from exporter.torch_threads import torch_threads_kept
from exporter.verify.check import Candidate, read_all_weights
from exporter.verify.sketches import estimated_sums, held_estimates, sketch
from exporter.verify.sums import different_values
from exporter.verify.weights import Check, Part, WeightsResult, gathered

if TYPE_CHECKING:
    from exporter.verify.pack_opened import OpenedPack, StoredSketches

Floats = npt.NDArray[np.float32]
# Of some rows: sketches of the merge and of the adapter's change, and how varied the base's values are.
_Part = tuple[Floats, Floats | None, tuple[int, int]]


def sketch_data(model: MergedModel, threads: int) -> Iterator[memoryview]:
    """The data of a pack's file of sketches, in the order of `sketch_tensors`, a tensor at a time.

    Base and adapters are read and merged once more, on the CPU.

    Args:
        model: the merged model.
        threads: threads that compute.
    """
    base_values = []
    with (
        torch_threads_kept(),
        TensorReader() as reader,
        ThreadPoolExecutor(threads, thread_name_prefix="sketches") as pool,
    ):
        merger, workspace = make_merger("cpu", reader), Workspace()

        def part(tensor: MergedTensor, block: RowBlock, factors: tuple[torch.Tensor, ...]) -> _Part:
            shape = (block.count, tensor.source.columns)
            base = workspace.take("base", torch.float32, shape) if tensor.updates else None
            merged = merger.block(tensor, block, factors, base=base).numpy()
            if base is None:
                return sketch(merged), None, (0, 0)
            delta = np.subtract(merged, base.numpy(), out=workspace.take("delta", torch.float32, shape).numpy())
            return sketch(merged), sketch(delta), different_values(base.numpy())

        for tensor in model.tensors:
            factors = merger.factors(tensor)
            blocks = row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu")
            parts = [future.result() for future in [pool.submit(part, tensor, one, factors) for one in blocks]]
            for whole in ([merged for merged, _, _ in parts], [delta for _, delta, _ in parts if delta is not None]):
                if whole:
                    yield np.concatenate(whole).astype("<f4", copy=False).data.cast("B")
            base_values.append([sum(values[number] for _, _, values in parts) for number in (0, 1)])
    yield np.array(base_values, dtype="<i4").data.cast("B")


def read_foreign(
    candidate: Candidate, pack: OpenedPack, reporter: Reporter, threads: int
) -> tuple[WeightsResult | None, list[str]]:
    """Read back an artifact that came without a manifest, and may be another program's: what its files say otherwise
    than the pack is told and is no fault, since they may say it in other words.

    Args:
        candidate: the artifact.
        pack: what is known of the trained model.
        reporter: told about it.
        threads: threads that compute.

    Returns:
        What is in its weights, and what to say of its files.
    """
    try:
        (found,) = read_all_weights([candidate], pack.model, reporter, threads, against(pack))
    except UnsupportedModelError as error:
        return None, [f"its weights were not looked at: {error.thing} is {error.found}"]
    if found is None or not found.faults:
        return found, []
    more = f" and {len(found.faults) - 3} more" if len(found.faults) > 3 else ""
    return replace(found, faults=()), [f"its files say otherwise than the pack: {'; '.join(found.faults[:3])}{more}"]


def against(pack: OpenedPack) -> Check:
    """Holds what an artifact stores against the sketches of a pack."""
    return partial(check_sketches, sketches=pack.sketches)


def check_sketches(
    model: MergedModel, reader: WeightReader, threads: int, checksums: Mapping[str, str], sketches: StoredSketches
) -> WeightsResult:
    """Hold what an artifact stores against the sketches of a pack.

    Args:
        model: the merged model, without weights.
        reader: the artifact's weights.
        threads: threads that compute.
        checksums: see `check_weights`.
        sketches: what is known of the merge.
    """
    present = [tensor for tensor in model.tensors if tensor.name in reader.weights]

    def part(name: str, block: RowBlock) -> Part:
        weight = reader.weights[name]
        stored = reader.rows(weight, block.first, block.count)
        known = sketches.rows(name, block.first, block.count)
        sums = estimated_sums(stored.values, *known, weight, block.first)
        return Part.of(stored, sums, Misfits(), checked=name in checksums)

    parts = (
        (tensor.name, partial(part, tensor.name, block))
        for tensor in present
        for block in row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu")
    )
    found = gathered(reader, parts, threads)
    tensors = []
    for tensor in present:
        if tensor.name in found.sums:
            different, looked_at = sketches.base_values(tensor.name)
            whole = replace(found.sums[tensor.name].whole(), different=different, looked_at=looked_at)
            tensors.append((reader.weights[tensor.name], whole))
    return found.result(tensors, checksums, held_estimates)
