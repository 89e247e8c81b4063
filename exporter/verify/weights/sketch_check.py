"""Sketches of the weights taken from base and adapters, and held against what an artifact stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exporter.backends.pieces import RowRun
from exporter.backends.weight_reader import ImpossibleGroups, StoredWeight, WeightReader
from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES, RowBlock, row_blocks
from exporter.merge.model import MergedModel
from exporter.verify.weights.check import Check, Part, WeightsResult, by_source, gathered
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
    stored = by_source(reader)
    present = [tensor for tensor in model.tensors if tensor.name in stored]

    def look(name: str, block: RowBlock) -> list[Part]:
        return [part(weight, run) for weight in stored[name] for run in weight.inside(block.first, block.count)]

    def part(weight: StoredWeight, run: RowRun) -> Part:
        rows = reader.rows(weight, run.stored, run.count)
        known = sketches.rows(weight.source, run.source, run.count)
        sums = estimated_sums(weight.arrangement.undo(rows.values), *known, weight, run.source)
        return Part.of(weight, run, rows, sums, ImpossibleGroups(), checked=weight.checksum_name in checksums)

    parts = (
        partial(look, tensor.name, block)
        for tensor in present
        for block in row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu")
    )
    found = gathered(reader, parts, threads)
    tensors = []
    for tensor in present:
        different, looked_at = sketches.base_values(tensor.name)
        for weight in stored[tensor.name]:
            if weight.key in found.sums:
                whole = replace(found.sums[weight.key].whole(), different=different, looked_at=looked_at)
                tensors.append((weight, whole))
    return found.result(tensors, checksums, estimate_checks)
