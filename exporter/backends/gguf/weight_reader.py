"""Reads the weights of a GGUF file back: its own header says where they are, the gguf package dequantizes them.

Nothing is shared with the writer but the rules that say which type a tensor of a file type has, and the importance
matrix that lies beside the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.backends.gguf.blocks.layouts import WEIGHED_TYPES
from exporter.backends.gguf.file_types import FILE_TYPES, FLOAT_TYPES, ModelShape, tensor_type
from exporter.backends.gguf.header_reader import Header, HeaderTensor, read_header
from exporter.backends.gguf.imatrix.file import ImatrixError, Importance, read_imatrix
from exporter.backends.gguf.metadata.model_keys_check import header_faults
from exporter.backends.gguf.ollama.modelfile_check import modelfile_faults
from exporter.backends.gguf.tensor_names import GgufTensor
from exporter.backends.model_folder.weight_reader import contradiction, float_weight
from exporter.backends.weight_reader import (
    ImpossibleGroups,
    StoredRows,
    StoredWeight,
    Tolerance,
    WeightReader,
    in_pieces,
)
from exporter.errors import ArtifactError
from exporter.families.base import Family
from exporter.merge.model import MergedModel

# Relative error that a type leaves on Gaussian weights, 512 rows of 1,024: the larger one of no importance and of one
# that is the same for all columns.
GAUSSIAN_ERRORS: Mapping[str, float] = {
    "Q4_0": 0.0859, "Q4_1": 0.0782, "Q5_0": 0.0427, "Q5_1": 0.0379, "Q8_0": 0.0054, "IQ4_NL": 0.0761,
    "Q2_K": 0.2968, "Q3_K": 0.1508, "Q4_K": 0.0713, "Q5_K": 0.0361, "Q6_K": 0.0177, "IQ4_XS": 0.0767,
    "IQ3_S": 0.1662, "IQ3_XXS": 0.2133, "IQ2_S": 0.2648, "IQ2_XS": 0.2996, "IQ2_XXS": 0.3438, "IQ1_M": 0.5826,
    "IQ1_S": 0.4861,
}  # fmt: skip
# Columns of a block that is one group, with a scale in 16 bits.
_OWN_SCALE = 32
# Columns that share a scale; 32 for all others.
_SMALL_GROUPS = frozenset({"Q2_K", "Q3_K", "Q6_K"})


class GgufReader(WeightReader):
    """The weights of one GGUF file; see `WeightReader`.

    Args:
        file: the file.
        quant: name of its file type.
        named: the tensors that it should hold.
        shape: what the rules for types need to know of the model.
        model: the merged model.
        family: its family.
    """

    def __init__(
        self,
        file: Path,
        quant: str,
        named: list[GgufTensor],
        shape: ModelShape,
        model: MergedModel,
        family: Family,
    ) -> None:
        from exporter.inputs.row_blocks import Workspace

        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._workspace = Workspace()
        self._tensors: Mapping[str, HeaderTensor] = {}
        # None if there is an importance matrix that is not known.
        self._importance: Mapping[str, Importance] | None = {}
        self.weights: dict[str, StoredWeight] = {}
        try:
            header = read_header(file)
        except ArtifactError as error:
            self.faults = (f"{error.thing} is not readable: {error.found}",)
            return
        self._tensors, size, faults = header.tensors, os.fstat(self._descriptor).st_size, []
        file_type = FILE_TYPES[quant]
        if header.file_type != file_type.number:
            faults.append(f"{file.name} says file type {header.file_type}, {quant} is {file_type.number}")
        faults += header_faults(header.metadata, model, family)
        faults += modelfile_faults(file, quant, model)
        if header.imatrix:
            self._importance, unreadable = _importance(file, header)
            faults += unreadable
        for tensor in named:
            name = tensor.name
            wanted, _ = tensor_type(name, tensor.shape, file_type, shape, imatrix=header.imatrix)
            found = header.tensors.get(name)
            if found is None:
                faults.append(f"{name} is missing")
            elif found.type != wanted or found.shape != tensor.shape:
                stored = f"{found.type} {list(found.shape)}"
                faults.append(f"{name} is {stored} and should be {wanted} {list(tensor.shape)} in {quant}")
            elif found.end > size:
                faults.append(f"{name} is cut off: {found.end - size} bytes are missing in {file.name}")
            else:
                weight = _weight(found, imatrix=header.imatrix)
                self.weights |= {one.key: one for one in in_pieces(weight, tensor.pieces, tensor.arrangement)}
        faults += [
            f"{name} is not a tensor of the model" for name in header.tensors.keys() - {one.name for one in named}
        ]
        self.faults = tuple(faults)

    def rows(self, weight: StoredWeight, first: int, count: int) -> StoredRows:
        """See `WeightReader`."""
        raw = self._raw(weight, first, count)
        return StoredRows(self._values(weight, raw), raw)

    def impossible_groups(
        self, weight: StoredWeight, first: int, stored: StoredRows, merged: npt.NDArray[np.float32], noise: float
    ) -> ImpossibleGroups:
        """See `WeightReader`."""
        from exporter.backends.gguf.blocks.impossible_groups import impossible_groups

        found = (self._importance or {}).get(weight.name)
        weighed = self._importance is None or found is not None
        importance = None
        # Only these are computed with it; of many experts, importances for each row take room.
        if weight.type in WEIGHED_TYPES and found is not None:
            importance = row_importances(found, weight, first, len(merged))
        assert stored.encoded is not None
        return impossible_groups(
            weight.type, stored.encoded, stored.values, merged, noise=noise, first=first,
            weighed=weighed, importance=importance, workspace=self._workspace,
        )  # fmt: skip

    def _raw(self, weight: StoredWeight, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Rows as they are stored."""
        tensor = self._tensors[weight.name]
        raw = np.empty((count, tensor.row_bytes), dtype=np.uint8)
        if os.preadv(self._descriptor, [raw.data], tensor.start + first * tensor.row_bytes) != raw.nbytes:
            raise contradiction(weight.name, "a file that ends early", f"{raw.nbytes} bytes from row {first} on")
        return raw

    def _values(self, weight: StoredWeight, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values: npt.NDArray[np.float32] = dequantize(raw, GGMLQuantizationType[weight.type])
        return values.astype(np.float32, copy=False)

    def close(self) -> None:
        """See `WeightReader`."""
        os.close(self._descriptor)


def _importance(file: Path, header: Header) -> tuple[Mapping[str, Importance] | None, list[str]]:
    """The importance matrix that a file names, by its tensors' names; None if it is not there or not readable."""
    name = header.metadata.get("quantize.imatrix.file")
    # A name of the exporter's own; of llama-quantize, a path of the machine that it ran on.
    if not isinstance(name, str) or Path(name).name != name or not (beside := file.parent / name).is_file():
        return None, []
    try:
        return read_imatrix(beside).entries, []
    except ImatrixError as error:
        return None, [f"{name} is not readable: {error.found}"]


def row_importances(found: Importance, weight: StoredWeight, first: int, count: int) -> npt.NDArray[np.float32] | None:
    """Importances of some rows, float32 (columns,) or (count, columns); None if there are not as many."""
    experts, columns, values = prod(weight.shape[:-2]), weight.shape[-1], found.mean()
    # Old files have those of all experts in one.
    if values.size != experts * columns:
        return None
    if experts == 1:
        return values.reshape(columns)
    rows: npt.NDArray[np.float32] = values.reshape(experts, columns)[
        np.arange(first, first + count) // weight.shape[-2]
    ]
    return rows


def _weight(tensor: HeaderTensor, *, imatrix: bool) -> StoredWeight:
    """A stored tensor, before it is known what it is made from."""
    if tensor.type in FLOAT_TYPES:
        return float_weight(tensor.name, tensor.name, tensor.type, tensor.shape)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]][0]
    group = 16 if tensor.type in _SMALL_GROUPS else 32
    allowed = tolerance(tensor.type, block, imatrix=imatrix)
    return StoredWeight(tensor.name, tensor.name, tensor.type, tensor.shape, group, block, allowed)


def tolerance(kind: str, block: int, *, imatrix: bool) -> Tolerance:
    """What a quantized type allows.

    Args:
        kind: the type.
        block: columns of its block.
        imatrix: whether errors were weighed by an importance matrix, which lets some columns err more.
    """
    # Measured: a tensor is up to 2.1 times as far off as Gaussian weights, a group 3.8 times and its scale 1.3 times;
    # with importances as uneven as exp(2 * normal), a group 10.3 times and its scale 9.4 times. Where each group has a
    # scale of its own that would leave a third of it unseen. Importances of two windows of a real 0.5B, which are more
    # uneven than those of 16, let such a group err 3.8 times as much, and its scale 3.1 times.
    error, wide = GAUSSIAN_ERRORS[kind], 1.0
    if imatrix:
        wide = 1.3 if block == _OWN_SCALE else 2.5
    # A float16 scale of 256 columns is multiplied by up to 2^12 (Q6_K: 127 · 32), of 32 by 2^7.
    resolution = 2.0**-25 * (4096 if block == 256 else 128)
    return Tolerance(min(0.85, 3 * error), 6 * wide * error, 4 * wide * error, resolution)
