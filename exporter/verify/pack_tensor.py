"""Tensors of a reference pack, and how they lie in their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from exporter.checkpoint import DTYPE_BYTES


@dataclass(frozen=True)
class PackTensor:
    """One tensor of a pack.

    Attributes:
        file: the file that holds it.
        dtype: as safetensors calls it.
        shape: its dimensions, outermost first.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def lay_out(tensors: Mapping[str, PackTensor]) -> dict[str, tuple[bytes, int]]:
    """Header and bytes of data of each file, by name; a file's tensors follow each other in the order given.

    The header is padded so that the data starts aligned to 8 bytes (https://github.com/huggingface/safetensors,
    "Format").
    """
    found = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        fields, position = {}, 0
        for name, tensor in tensors.items():
            if tensor.file == file:
                offsets = [position, position + tensor.nbytes]
                fields[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
                position += tensor.nbytes
        packed = json.dumps(fields, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        found[file] = len(packed).to_bytes(8, "little") + packed, position
    return found
