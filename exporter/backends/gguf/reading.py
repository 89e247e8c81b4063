"""Reads the weights of a GGUF file back: its own header says where they are, the gguf package dequantizes them.

Nothing is shared with the writer but the rules that say which type a tensor of a file type has, and the importance
matrix that lies beside the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from exporter.backends.gguf.blocks import WEIGHED_TYPES
from exporter.backends.gguf.imatrix import ImatrixError, Importance, read_imatrix
from exporter.backends.gguf.stated import header_faults
from exporter.backends.gguf.stated_modelfile import modelfile_faults
from exporter.backends.gguf.types import FILE_TYPES, FLOAT_TYPES, ModelShape, tensor_type
from exporter.backends.reading import Misfits, StoredRows, StoredWeight, Tolerance
from exporter.backends.shards import contradiction, float_weight
from exporter.errors import ArtifactError
from exporter.families import Family
from exporter.model import MergedModel, MergedTensor

# Metadata values by their type's number (specification: ggml/docs/gguf.md); 8 is a string, 9 an array.
_VALUES = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Bytes of a string, or items of an array.
_LONGEST = 1 << 26
# GGML_MAX_DIMS (ggml/include/ggml.h)
_MOST_DIMENSIONS = 4

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


@dataclass(frozen=True)
class HeaderTensor:
    """What the header says of one tensor.

    Attributes:
        name: its name.
        shape: its dimensions, outermost first.
        type: name of its `ggml_type`.
        start: offset in bytes from the start of the file.
        row_bytes: bytes of one row.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    row_bytes: int

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.start + prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        file_type: value of `general.file_type`, None if it does not say.
        imatrix: whether it says that it was made with an importance matrix.
        tensors: by name.
        metadata: by key; arrays as lists, and None for those of arrays.
    """

    file_type: int | None
    imatrix: bool
    tensors: Mapping[str, HeaderTensor]
    metadata: Mapping[str, Any]


def read_header(file: Path) -> Header:
    """Read a file's header.

    Raises:
        ArtifactError: it is no GGUF file, or a tensor has a type that the gguf package does not know.
    """
    with file.open("rb") as stream:
        try:
            return _Parser(stream, file.name).header()
        except (struct.error, UnicodeDecodeError, KeyError, RecursionError, OSError) as error:
            raise contradiction(file.name, f"a header that ends or says {error}", "a whole GGUF header") from None


class _Parser:
    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name

    def header(self) -> Header:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        magic, version, tensor_count, value_count = self._take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise contradiction(self._name, f"{magic!r}, version {version}", "GGUF, version 3")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            metadata[key] = self._value(self._take("<I")[0])
        infos = []
        for _ in range(tensor_count):
            name = self._string()
            (dimensions,) = self._take("<I")
            if not 0 < dimensions <= _MOST_DIMENSIONS:
                raise contradiction(name, f"{dimensions} dimensions", f"1 to {_MOST_DIMENSIONS}")
            shape = self._take(f"<{dimensions}Q")[::-1]
            infos.append((name, shape, *self._take("<IQ")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise contradiction(self._name, f"general.alignment {alignment!r}", "a number of bytes")
        data = -(-self._stream.tell() // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in infos:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise contradiction(name, f"type {number}", "a type that the gguf package knows") from None
            elements, nbytes = GGML_QUANT_SIZES[kind]
            tensors[name] = HeaderTensor(name, shape, kind.name, data + offset, shape[-1] // elements * nbytes)
        imatrix = any(key.startswith("quantize.imatrix.") for key in metadata)
        return Header(metadata.get("general.file_type"), imatrix, tensors, metadata)

    def _take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._stream.read(struct.calcsize(layout)))

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if length > _LONGEST:
            raise contradiction(self._name, f"a string of {length} bytes", "a whole GGUF header")
        return self._stream.read(length).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        """A value; None for an array of arrays."""
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._take("<IQ")
            if count > _LONGEST:
                raise contradiction(self._name, f"an array of {count} values", "a whole GGUF header")
            if item in _VALUES:
                return list(self._take(f"<{count}{_VALUES[item][1]}"))
            values = [self._value(item) for _ in range(count)]
            return values if item == _STRING else None
        return self._take(_VALUES[kind])[0]


class GgufReader:
    """The weights of one GGUF file; see `CheckingReader`.

    Args:
        file: the file.
        quant: name of its file type.
        named: the merged tensors that it should hold, with their GGUF names.
        shape: what the rules for types need to know of the model.
        model: the merged model.
        family: its family.
    """

    def __init__(
        self,
        file: Path,
        quant: str,
        named: list[tuple[str, MergedTensor]],
        shape: ModelShape,
        model: MergedModel,
        family: Family,
    ) -> None:
        from exporter.merge import Workspace

        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._workspace = Workspace()
        self._tensors: Mapping[str, HeaderTensor] = {}
        # None if there is an importance matrix that is not known.
        self._importance: Mapping[str, Importance] | None = {}
        self.weights: dict[str, StoredWeight] = {}
        try:
            header = read_header(file)
        except ArtifactError as error:
            self.faults: tuple[str, ...] = (f"{error.thing} is not readable: {error.found}",)
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
        for name, tensor in named:
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
                self.weights[tensor.name] = _weight(found, tensor.name, imatrix=header.imatrix)
        faults += [
            f"{name} is not a tensor of the model" for name in header.tensors.keys() - {name for name, _ in named}
        ]
        self.faults = tuple(faults)

    def rows(self, weight: StoredWeight, first: int, count: int) -> StoredRows:
        """See `WeightReader`."""
        raw = self._raw(weight, first, count)
        return StoredRows(self._values(weight, raw), raw)

    def misfits(
        self, weight: StoredWeight, first: int, stored: StoredRows, merged: npt.NDArray[np.float32], noise: float
    ) -> Misfits:
        """See `CheckingReader`."""
        from exporter.backends.gguf.encoding import misfits

        found = (self._importance or {}).get(weight.name)
        weighed = self._importance is None or found is not None
        importance = None
        # Only these are computed with it; of many experts, importances for each row take room.
        if weight.type in WEIGHED_TYPES and found is not None:
            importance = row_importances(found, weight, first, len(merged))
        assert stored.encoded is not None
        return misfits(
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


def _weight(tensor: HeaderTensor, source: str, *, imatrix: bool) -> StoredWeight:
    if tensor.type in FLOAT_TYPES:
        return float_weight(tensor.name, source, tensor.type, tensor.shape)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]][0]
    group = 16 if tensor.type in _SMALL_GROUPS else 32
    return StoredWeight(
        tensor.name, source, tensor.type, tensor.shape, group, block, tolerance(tensor.type, block, imatrix=imatrix)
    )


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
