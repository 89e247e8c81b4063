"""Sketches of weights: random sums of each run of columns."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES, RowBlock, Workspace, row_blocks
from exporter.inputs.tensor_reader import TensorReader
from exporter.libraries.torch_threads import torch_threads_kept
from exporter.merge.device import make_merger
from exporter.merge.merger import Factors
from exporter.merge.model import MergedModel, MergedTensor
from exporter.plan.reference_pack import RUN, runs_of

Floats = npt.NDArray[np.float32]


@lru_cache(maxsize=16)
def signs(columns: int) -> Floats:
    """1 or -1 for each column, the same for every tensor: float32, shape (columns,).

    Bits of Philox with the key 0, the lowest first; numpy keeps the streams of its bit generators.
    """
    words = np.random.Philox(key=0).random_raw(-(-columns // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:columns]
    return bits.astype(np.float32) * 2 - 1


def sketch(values: Floats) -> Floats:
    """The sketch of some rows.

    Args:
        values: float32, shape (rows, columns).

    Returns:
        float32, shape (rows, runs).
    """
    return by_run(values, np.broadcast_to(signs(values.shape[1]), values.shape))


def by_run(left: Floats, right: Floats) -> Floats:
    """Inner products of each run: float32, (rows, runs). Their last bits depend on the columns and on the processor's
    kind, and not on threads or blocks of rows."""
    rows, columns = left.shape
    found = np.empty((rows, runs_of(columns)), dtype=np.float32)
    for number, first in enumerate(range(0, columns, RUN)):
        part = slice(first, first + RUN)
        np.einsum("rk,rk->r", left[:, part], right[:, part], out=found[:, number])
    return found


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

        def part(tensor: MergedTensor, block: RowBlock, factors: Factors) -> _Part:
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


# Columns among which equal values are counted, and the share of different ones above which a base is not on a grid.
# Gaussian weights in bfloat16 have 0.97; dequantized from Q8_0 0.9, from Q5_0 0.55.
VARIED_COLUMNS = 32


def different_values(base: Floats) -> tuple[int, int]:
    """Different values in runs of columns, and values, of the first rows; they are enough to tell."""
    columns = base.shape[1] // VARIED_COLUMNS * VARIED_COLUMNS
    runs = np.sort(base[:64, :columns].reshape(-1, VARIED_COLUMNS), axis=1)
    return int((np.diff(runs, axis=1) != 0).sum()) + len(runs), runs.size
