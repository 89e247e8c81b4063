"""Reads the weights of a GPTQ folder back, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.backends.gptq.bit_unpacking import PARTS, bits_of, parts_of, unpack_layer
from exporter.backends.gptq.config_check import stated_faults
from exporter.backends.gptq.names import WORD_BITS, parse_quant, quant_name
from exporter.backends.model_folder.documents_check import document_faults
from exporter.backends.model_folder.index_check import stray_faults
from exporter.backends.model_folder.weight_reader import (
    FLOAT_TOLERANCES,
    Shards,
    contradiction,
    float_rows,
    float_weight,
)
from exporter.backends.weight_reader import (
    NAMED_GROUPS,
    ImpossibleGroups,
    StoredRows,
    StoredWeight,
    Tolerance,
    WeightReader,
)
from exporter.errors import ArtifactError
from exporter.families.roles import module_of
from exporter.merge.model import MergedModel, MergedTensor

# By bits, whatever the groups. The largest of tensor, group and scale that were measured on the demo: 8 bits 0.010,
# 0.017 and 0.004 (groups of 128); 4 bits 0.171, 0.286 and 0.111 (of 32, and one for all); 3 bits 0.289, 0.483 and 0.180
# (of 128); 2 bits 0.592, 0.724 and 0.119 (one for all). On a real 0.5B in groups of 128, where columns that hardly meet
# an input may hold anything: 0.016, 1.34 and 0.011; 0.244, 5.12 and 0.22; 0.429, 6.51 and 0.30; 0.751, 6.29 and
# 0.78. Scales are at least 2^-14.
TOLERANCES: Mapping[int, Tolerance] = {
    8: Tolerance(0.03, 3.0, 0.03, 2.0**-15, clipped=True),
    4: Tolerance(0.33, 10.0, 0.3, 2.0**-15, clipped=True),
    3: Tolerance(0.6, 13.0, 0.5, 2.0**-15, clipped=True),
    2: Tolerance(0.85, 20.0, 0.9, 2.0**-15, clipped=True),
}

# Bits of a normal float16 that bfloat16, whose mantissa is three bits shorter, has none of.
_BEYOND_BFLOAT16 = 0b111


@dataclass(frozen=True)
class UnpackedRows(StoredRows):
    """Rows of a packed weight.

    Attributes:
        scales: float16, shape (rows, groups).
    """

    scales: npt.NDArray[np.float16]


class GptqReader(WeightReader):
    """The weights of a folder of packed layers and floats; see `WeightReader`.

    Args:
        model: the merged model.
        quant: the folder's type.
        folder: the folder.
        own_scales: whether scales must be numbers as our own solver makes them (`exporter.backends.gptq.solver.grid`).
    """

    def __init__(self, model: MergedModel, quant: str, folder: Path, *, own_scales: bool = True) -> None:
        self._own_scales = own_scales
        self._shards = Shards(folder)
        self.weights: dict[str, StoredWeight] = {}
        self._bits, self._group_size, self._format = 0, -1, "gptq"
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
            self._bits, self._group_size = int(config["bits"]), int(config["group_size"])
            self._format = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.faults = (f"config.json has no quantization_config that can be read: {error}",)
            return
        faults = [*self._shards.faults, *document_faults(model, folder)]
        if (self._bits, self._group_size) != parse_quant(quant):
            faults.append(f"config.json says {quant_name(self._bits, self._group_size)} and should say {quant}")
        for tensor in model.tensors:
            try:
                self.weights[tensor.name] = self._weight(tensor)
            except ArtifactError as error:
                faults.append(f"{error.thing} is {error.found} and should be {error.expected}")
        known = {name for tensor in model.tensors for name in self._names(tensor.name)}
        faults += stray_faults(self._shards.tensors, known)
        faults += stated_faults(folder, config, model, self._shards, self.weights)
        self.faults = tuple(faults)

    def _weight(self, tensor: MergedTensor) -> StoredWeight:
        parts = self._parts(tensor.name)
        if "qweight" not in parts:
            found = self._shards.tensors.get(tensor.name)
            if found is None or found.shape != tensor.shape or found.dtype not in FLOAT_TOLERANCES:
                stored = f"{found.dtype} {list(found.shape)}" if found else "missing"
                raise contradiction(tensor.name, stored, f"floats {list(tensor.shape)}, or packed")
            return float_weight(tensor.name, tensor.name, found.dtype, found.shape)
        name = module_of(tensor.name)
        if lacking := [part for part in PARTS[:3] if part not in parts]:
            raise contradiction(f"{name}.{lacking[0]}", "missing", "there beside qweight")
        bits, (rows, columns) = bits_of(parts, self._bits), tensor.shape
        groups = parts["scales"][0]
        wanted = {
            "qweight": (columns * bits // WORD_BITS, rows),
            "qzeros": (groups, rows * bits // WORD_BITS),
            "scales": (groups, rows),
        }
        for part, shape in wanted.items():
            if parts[part] != shape:
                raise contradiction(f"{name}.{part}", f"{list(parts[part])}", f"{list(shape)}")
        if bits not in TOLERANCES or columns % groups:
            raise contradiction(name, f"{bits} bits in {groups} groups", "2, 3, 4 or 8 bits in groups of one size")
        group = columns // groups
        return StoredWeight(
            f"{name}.qweight", tensor.name, f"INT{bits}", (rows, columns), group, group, TOLERANCES[bits]
        )

    def _parts(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that make up a packed weight."""
        found = parts_of(self._shards.tensors, module_of(weight))
        return {part: tensor.shape for part, tensor in found.items()}

    def _names(self, weight: str) -> list[str]:
        """What a weight may be stored as."""
        module = module_of(weight)
        return [f"{module}.{part}" for part in PARTS] if f"{module}.qweight" in self._shards.tensors else [weight]

    def rows(self, weight: StoredWeight, first: int, count: int) -> StoredRows:
        """See `WeightReader`. Only the columns of the packed tensors that hold these rows are read.

        Raises:
            ArtifactError: tensors contradict each other, or a zero point cannot be told.
        """
        if weight.name == weight.source:
            return float_rows(self._shards, weight, first, count)
        return self._unpacked(weight, first, count)

    def impossible_groups(
        self, weight: StoredWeight, first: int, stored: StoredRows, merged: npt.NDArray[np.float32], noise: float
    ) -> ImpossibleGroups:
        """See `WeightReader`. Of scales that our solver made it is known that bfloat16 holds them, too."""
        del merged, noise
        if not self._own_scales or not isinstance(stored, UnpackedRows):
            return ImpossibleGroups()
        return foreign_scales(stored.scales, weight.group, first)

    def _unpacked(self, weight: StoredWeight, first: int, count: int) -> UnpackedRows:
        module, bits = weight.name.removesuffix(".qweight"), int(weight.type.removeprefix("INT"))
        # Whole words of zero points.
        start = first - first % WORD_BITS
        end = min(weight.shape[0], -(-(first + count) // WORD_BITS) * WORD_BITS)
        parts = {
            "qweight": self._shards.read(f"{module}.qweight", slice(0, None), slice(start, end)),
            "qzeros": self._shards.read(
                f"{module}.qzeros", slice(0, None), slice(start * bits // WORD_BITS, end * bits // WORD_BITS)
            ),
            "scales": self._shards.read(f"{module}.scales", slice(0, None), slice(start, end)),
        }
        if f"{module}.g_idx" in self._shards.tensors:
            parts["g_idx"] = self._shards.read(f"{module}.g_idx", slice(0, None))
        arrays = {name: part.numpy() for name, part in parts.items()}
        try:
            unpacked = unpack_layer(arrays, bits, self._group_size, self._format)
            values = np.ascontiguousarray(unpacked[first - start :][:count])
            return UnpackedRows(values, values.view(np.uint8), arrays["scales"].T[first - start :][:count])
        except ArtifactError as error:
            raise contradiction(module, error.found, error.expected) from None

    def close(self) -> None:
        """See `WeightReader`: nothing stays open."""


def foreign_scales(scales: npt.NDArray[np.float16], group: int, first: int = 0) -> ImpossibleGroups:
    """Scales that our solver does not make: of a float16 that bfloat16 holds, the three lowest bits are zero.

    Args:
        scales: float16, shape (rows, groups).
        group: columns of a group.
        first: number of the first row.
    """
    bits = np.ascontiguousarray(scales, dtype=np.float16).view(np.uint16)
    found = np.argwhere(bits & _BEYOND_BFLOAT16 != 0)
    named = tuple(
        f"columns {number * group} to {(number + 1) * group - 1} of row {first + row}: the scale is "
        f"{float(scales[row, number]):.5g} and should be a number that bfloat16 holds"
        for row, number in found[:NAMED_GROUPS].tolist()
    )
    return ImpossibleGroups(len(found), named)
