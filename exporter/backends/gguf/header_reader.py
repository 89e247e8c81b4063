"""Reads the header of a GGUF file with bounded reads."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from exporter.backends.model_folder.weight_reader import contradiction

# Metadata values by their type's number (specification: ggml/docs/gguf.md); 8 is a string, 9 an array.
_VALUES = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Bytes of a string, or items of an array.
_LONGEST = 1 << 26
# GGML_MAX_DIMS (ggml/include/ggml.h)
_MOST_DIMENSIONS = 4


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
