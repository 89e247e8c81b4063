"""Reads the weights of a model folder of safetensors files back, with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from exporter.backends.model_folder.documents_check import document_faults
from exporter.backends.model_folder.index_check import index_faults, stray_faults
from exporter.backends.weight_reader import StoredRows, StoredWeight, Tolerance, WeightReader
from exporter.errors import ArtifactError
from exporter.merge.model import MergedModel

if TYPE_CHECKING:
    import torch


# Of every element, as no scale is shared. Half a unit in the last place is at most 2^-11 of a float16 and 2^-8 of a
# bfloat16. A little more, for merges that differ in the last bits of a float32 (another device, say).
FLOAT_TOLERANCES: Mapping[str, Tolerance] = {
    "F32": Tolerance(1e-5, 1e-5, 1e-5, 1e-7),
    "F16": Tolerance(0.0005, 0.0005, 0.0005, 1e-7),
    "BF16": Tolerance(0.004, 0.004, 0.004, 1e-7),
}


def float_weight(name: str, source: str, dtype: str, shape: tuple[int, ...]) -> StoredWeight:
    """A tensor that is stored as F32, F16 or BF16."""
    return StoredWeight(name, source, dtype, shape, 1, 1, FLOAT_TOLERANCES[dtype])


@dataclass(frozen=True)
class ShardTensor:
    """What a header says of one tensor.

    Attributes:
        file: the file that holds it.
        dtype: as safetensors calls it.
        shape: its dimensions, outermost first.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """The tensors of a folder.

    Every read opens its file anew: the library maps it, and mapped pages count as memory until it is closed.

    Attributes:
        tensors: those that are whole, by name; of one that is in two files, the first.
        faults: what is wrong with the files, and with their index.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, ShardTensor] = {}
        self._holders: dict[str, list[str]] = {}
        faults: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            faults += self._add(file)
        # What a file that cannot be read holds is not known.
        self.faults = tuple(faults or index_faults(folder, self._holders))

    def _add(self, file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    view = opened.get_slice(name)
                    found = ShardTensor(file, view.get_dtype(), tuple(view.get_shape()))
                    self.tensors.setdefault(name, found)
                    self._holders.setdefault(name, []).append(file.name)
        except (SafetensorError, OSError) as error:
            return _cut_off(file) or [f"{file.name} cannot be read: {error}"]
        return []

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """Part of a tensor, in its own dtype.

        Args:
            name: one of `tensors`.
            rows: of the first dimension; a scalar has none, and is read whole.
            columns: of the second; None for all.
        """
        with safe_open(self.tensors[name].file, framework="pt") as opened:
            if not self.tensors[name].shape:
                scalar: torch.Tensor = opened.get_tensor(name).clone()
                return scalar
            view = opened.get_slice(name)
            part: torch.Tensor = view[rows] if columns is None else view[rows, columns]
            return part.clone()


def _cut_off(file: Path) -> list[str]:
    """Names of tensors beyond the end of a file, if that is what is wrong with it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, size)))
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if "dtype" in entry}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return []
    return [
        f"{name} is cut off: {end - size} bytes are missing in {file.name}" for name, end in ends.items() if end > size
    ]


class FloatReader(WeightReader):
    """The weights of a folder that stores floats under the model's own names; see `WeightReader`.

    Args:
        model: the merged model.
        folder: the folder.
        dtypes: the dtype that each tensor should have, by name.
    """

    def __init__(self, model: MergedModel, folder: Path, dtypes: Mapping[str, str]) -> None:
        self._shards = Shards(folder)
        self.weights: dict[str, StoredWeight] = {}
        faults = [*self._shards.faults, *document_faults(model, folder)]
        for tensor in model.tensors:
            found = self._shards.tensors.get(tensor.name)
            fault = float_fault(tensor.name, found, tensor.shape, dtypes[tensor.name])
            if fault:
                faults.append(fault)
            elif found:
                self.weights[tensor.name] = float_weight(tensor.name, tensor.name, found.dtype, found.shape)
        faults += stray_faults(self._shards.tensors, dtypes)
        self.faults = tuple(faults)

    def rows(self, weight: StoredWeight, first: int, count: int) -> StoredRows:
        """See `WeightReader`."""
        return float_rows(self._shards, weight, first, count)

    def close(self) -> None:
        """See `WeightReader`: nothing stays open."""


def float_fault(name: str, found: ShardTensor | None, shape: tuple[int, ...], dtype: str) -> str | None:
    """What is wrong with a tensor that should be there with that shape and dtype."""
    if found is None:
        return f"{name} is missing"
    if found.dtype != dtype or found.shape != shape:
        return f"{name} is {found.dtype} {list(found.shape)} and should be {dtype} {list(shape)}"
    return None


def float_rows(shards: Shards, weight: StoredWeight, first: int, count: int) -> StoredRows:
    """Rows of a tensor of floats, of any number of dimensions; see `WeightReader.rows`."""
    import torch

    if len(weight.shape) < 2:
        part = shards.read(weight.name, slice(0, None))
    elif len(weight.shape) == 2:
        part = shards.read(weight.name, slice(first, first + count))
    else:
        # Of experts, say: rows of the matrices in a stack.
        each = int(np.prod(weight.shape[1:-1]))
        outer = slice(first // each, -(-(first + count) // each))
        part = shards.read(weight.name, outer).reshape(-1, weight.shape[-1])[first - outer.start * each :][:count]
    # A view as bytes needs a dimension.
    encoded = part.reshape(count, -1).view(torch.uint8).numpy()
    return StoredRows(part.float().numpy().reshape(count, -1), encoded)


def contradiction(thing: str, found: str, expected: str) -> ArtifactError:
    """The error for stored tensors that contradict their format."""
    return ArtifactError(thing, found=found, expected=expected, remedy="The artifact is damaged: export it again.")
