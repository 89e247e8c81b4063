"""Headers that lie: what is wrong has a name, and nothing is believed that would take all memory or a traceback."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from exporter.backends.gguf.reading import read_header
from exporter.errors import ArtifactError


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*, dimensions: bytes = struct.pack("<I2Q", 2, 32, 4), value: bytes = b"", kind: int = 0) -> bytes:
    """One tensor of F32, and one value of the metadata if it is given: `general.alignment`."""
    key = text(b"general.alignment") + struct.pack("<I", kind) + value if value else b""
    tensor = text(b"token_embd.weight") + dimensions + struct.pack("<IQ", 0, 0)
    return struct.pack("<4sIQQ", b"GGUF", 3, 1, bool(value)) + key + tensor


def test_the_header_that_the_others_are_made_from_is_sound(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(header(value=struct.pack("<I", 64), kind=4))
    (tensor,) = read_header(file).tensors.values()
    assert (tensor.shape, tensor.type, tensor.row_bytes, tensor.start % 64) == ((4, 32), "F32", 128, 0)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (header(dimensions=struct.pack("<I", 0)), "0 dimensions"),
        (header(dimensions=struct.pack("<I2Q", 2**32 - 1, 32, 4)), "4294967295 dimensions"),
        (header(value=struct.pack("<I", 0), kind=4), "general.alignment 0"),
        (header(value=text(b"32"), kind=8), "general.alignment '32'"),
        (header(value=struct.pack("<IQ", 10, 2**64 - 1), kind=9), "an array of 18446744073709551615 values"),
        (header(value=struct.pack("<IQ", 10, 2**26), kind=9), "a header that ends or says"),
        (header(value=struct.pack("<IQ", 9, 1) * 5000, kind=9), "a header that ends or says"),
    ],
    ids=["no-dimension", "dimensions", "alignment", "alignment-text", "items", "fewer-items", "nested"],
)
def test_a_header_that_lies_is_no_header(tmp_path: Path, raw: bytes, said: str) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(raw)
    with pytest.raises(ArtifactError) as caught:
        read_header(file)
    assert said in caught.value.found
