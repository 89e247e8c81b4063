"""Headers that lie: what is wrong has a name, and nothing is believed that would take all memory or a traceback."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from exporter.backends.gguf.header_reader import read_header
from exporter.backends.gguf.imatrix.file import Importance
from exporter.backends.gguf.weight_reader import row_importances
from exporter.backends.weight_reader import StoredWeight, Tolerance
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


def test_gguf_s_own_reader_reads_that_header_too(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(header(value=struct.pack("<I", 64), kind=4).ljust(1024, b"\0"))
    (ours,), (theirs,) = read_header(file).tensors.values(), gguf.GGUFReader(file).tensors
    assert (ours.name, ours.type, ours.start) == (theirs.name, theirs.tensor_type.name, theirs.data_offset)
    assert ours.shape == tuple(theirs.shape.tolist()[::-1])


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


@pytest.mark.parametrize("entry", ["by expert", "all in one"])
def test_rows_of_experts_have_importances_of_their_own(entry: str) -> None:
    """Old files of importances have those of all experts in one entry."""
    sums = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    found = Importance(sums, np.ones(3, np.float32))
    if entry == "all in one":
        found = Importance(sums.reshape(1, 12), np.ones(1, np.float32))
    weight = StoredWeight("w", "w", "Q4_0", (3, 2, 4), 4, 4, Tolerance(1, 1, 1, 0))
    rows = row_importances(found, weight, 1, 4)
    assert rows is not None
    assert np.array_equal(rows, sums[[0, 1, 1, 2]])
    assert row_importances(found, StoredWeight("w", "w", "Q4_0", (3, 2, 5), 5, 5, weight.tolerance), 0, 1) is None
    whole = row_importances(found, StoredWeight("w", "w", "Q4_0", (7, 12), 4, 4, weight.tolerance), 3, 2)
    assert whole is not None
    assert np.array_equal(whole, sums.reshape(12))
