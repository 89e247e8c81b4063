"""The header of a GGUF file: magic, key-values, tensor infos (specification: ggml/docs/gguf.md).

The `gguf` package's writer packs the same bytes value by value and takes seconds for the 300,000 strings of a Qwen
vocabulary; this packs a list at a time. A test holds the two against each other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 32
_VERSION = 3
_TYPE_NUMBERS = {"uint32": 4, "int32": 5, "float32": 6, "bool": 7, "string": 8, "array": 9, "uint64": 10}
_FORMATS = {"uint32": "<I", "int32": "<i", "float32": "<f", "bool": "<?", "uint64": "<Q"}


@dataclass(frozen=True)
class Value:
    """A typed metadata value.

    Attributes:
        type: `uint32`, `int32`, `float32`, `bool`, `uint64`, `string`, or `[string]` and `[int32]` for arrays.
        value: the value.
    """

    type: str
    value: int | float | bool | str | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the header.

    Attributes:
        name: its name.
        shape: outermost dimension first; the file stores them the other way round.
        type_number: value of `ggml_type`.
        offset: from the start of the data, a multiple of the alignment.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def pad(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_header(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """The bytes of a whole header, padded so that the data follows it aligned."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += (_string(key), _value(value))
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", tensor.type_number, tensor.offset))
    packed = b"".join(parts)
    return packed + bytes(pad(len(packed)) - len(packed))


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if value.type == "string":
        return struct.pack("<I", _TYPE_NUMBERS["string"]) + _string(str(value.value))
    if value.type.startswith("["):
        item_type = value.type[1:-1]
        assert isinstance(value.value, Sequence)
        head = struct.pack("<IIQ", _TYPE_NUMBERS["array"], _TYPE_NUMBERS[item_type], len(value.value))
        if item_type == "string":
            return head + b"".join(map(_string, map(str, value.value)))
        return head + np.asarray(value.value, dtype="<i4").tobytes()
    return struct.pack("<I", _TYPE_NUMBERS[value.type]) + struct.pack(_FORMATS[value.type], value.value)
