"""Sketches of the weights taken from base and adapters, and held against what an artifact stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exporter.backends.weight_reader import ImpossibleGroups, WeightReader
from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES, RowBlock, row_blocks
from exporter.merge.model import MergedModel
from exporter.verify.weights.check import Check, Part, WeightsResult, gathered
from exporter.verify.weights.sketch_limits import estimate_checks, estimated_sums

if TYPE_CHECKING:
    from exporter.reference.pack.reader import OpenedPack, StoredSketches


Floats = npt.NDArray[np.float32]


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
        return Part.of(stored, sums, ImpossibleGroups(), checked=name in checksums)

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
    return found.result(tensors, checksums, estimate_checks)
