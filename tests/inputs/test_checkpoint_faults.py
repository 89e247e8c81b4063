"""Every fault of a safetensors header by its named error; mutated files are read right or refused, nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from exporter.errors import InvalidHeaderError, MissingFileError, RefusalError, TruncatedFileError
from exporter.inputs.checkpoint import read_header
from exporter.inputs.tensor_reader import TensorReader
from tests.folders import pack, raw_bytes, unpack


def open_with_reference(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = bytes(8)
DUPLICATE = (
    b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
)

FAULTS: dict[str, tuple[bytes, type[RefusalError]]] = {
    "empty file": (b"", TruncatedFileError),
    "half a length": (b"\x10\0\0", TruncatedFileError),
    "header cut": (pack({"t": F32}, b"")[:-5], TruncatedFileError),
    "data cut": (pack({"t": F32}, DATA[:-1]), TruncatedFileError),
    "no data": (pack({"t": F32}, b""), TruncatedFileError),
    "length longer than the file": (pack({"t": F32}, DATA, length=10_000), TruncatedFileError),
    "length of 2^64 - 1": (pack({"t": F32}, DATA, length=2**64 - 1), TruncatedFileError),
    "length of zero": (pack(b"", DATA), InvalidHeaderError),
    "length too short": (pack({"t": F32}, DATA, length=10), InvalidHeaderError),
    "length that takes in data": (
        pack({"t": F32}, DATA, length=len(json.dumps({"t": F32})) + 4),
        InvalidHeaderError,
    ),
    "not JSON": (pack(b"{'t': 1}", DATA), InvalidHeaderError),
    "not UTF-8": (pack(b'{"\xff": 1}', DATA), InvalidHeaderError),
    "a name that is half a surrogate pair": (
        pack(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        InvalidHeaderError,
    ),
    "UTF-16": (pack(json.dumps({"t": F32}).encode("utf-16"), DATA), InvalidHeaderError),
    "nested too deep": (pack(b"[" * 200_000, DATA), InvalidHeaderError),
    "a list": (pack([F32], DATA), InvalidHeaderError),
    "a number": (pack(1, DATA), InvalidHeaderError),
    "null": (pack(None, DATA), InvalidHeaderError),
    "a name twice": (pack(DUPLICATE, DATA), InvalidHeaderError),
    "a key of an entry twice": (
        pack(b'{"t":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', DATA),
        InvalidHeaderError,
    ),
    "entry is a list": (pack({"t": [1]}, DATA), InvalidHeaderError),
    "entry is null": (pack({"t": None}, DATA), InvalidHeaderError),
    "no dtype": (pack({"t": {"shape": [2], "data_offsets": [0, 8]}}, DATA), InvalidHeaderError),
    "no shape": (pack({"t": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA), InvalidHeaderError),
    "no offsets": (pack({"t": {"dtype": "F32", "shape": [2]}}, DATA), InvalidHeaderError),
    "unknown dtype": (pack({"t": F32 | {"dtype": "F31"}}, DATA), InvalidHeaderError),
    "dtype in lower case": (pack({"t": F32 | {"dtype": "f32"}}, DATA), InvalidHeaderError),
    "dtype is a number": (pack({"t": F32 | {"dtype": 32}}, DATA), InvalidHeaderError),
    "dtype is a list": (pack({"t": F32 | {"dtype": ["F32"]}}, DATA), InvalidHeaderError),
    "dtype is an object": (pack({"t": F32 | {"dtype": {}}}, DATA), InvalidHeaderError),
    "shape is a number": (pack({"t": F32 | {"shape": 2}}, DATA), InvalidHeaderError),
    "shape is negative": (pack({"t": F32 | {"shape": [-2]}}, DATA), InvalidHeaderError),
    "shape negative twice": (pack({"t": F32 | {"shape": [-1, -2]}}, DATA), InvalidHeaderError),
    "shape is a float": (pack({"t": F32 | {"shape": [2.0]}}, DATA), InvalidHeaderError),
    "shape is a bool": (pack({"t": F32 | {"shape": [True, 2]}}, DATA), InvalidHeaderError),
    "shape is too large": (pack({"t": F32 | {"shape": [3]}}, DATA), InvalidHeaderError),
    "shape is too small": (pack({"t": F32 | {"shape": [1]}}, DATA), InvalidHeaderError),
    "shape overflows 64 bits": (pack({"t": F32 | {"shape": [2**62 + 1, 4]}}, DATA), InvalidHeaderError),
    "shape with thousands of digits": (
        pack({"t": F32 | {"shape": [10**4000, 10**4000]}}, DATA),
        InvalidHeaderError,
    ),
    "offsets negative": (pack({"t": F32 | {"data_offsets": [-8, 0]}}, DATA), InvalidHeaderError),
    "offsets are bools": (
        pack({"t": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"\0"),
        InvalidHeaderError,
    ),
    "offsets are floats": (pack({"t": F32 | {"data_offsets": [0.0, 8.0]}}, DATA), InvalidHeaderError),
    "offsets are text": (pack({"t": F32 | {"data_offsets": ["0", "8"]}}, DATA), InvalidHeaderError),
    "offsets are three": (pack({"t": F32 | {"data_offsets": [0, 8, 8]}}, DATA), InvalidHeaderError),
    "offsets are one": (pack({"t": F32 | {"data_offsets": [0]}}, DATA), InvalidHeaderError),
    "offsets reversed": (pack({"t": F32 | {"data_offsets": [8, 0]}}, DATA), InvalidHeaderError),
    "offsets past the end": (pack({"t": F32 | {"data_offsets": [8, 16]}}, DATA), InvalidHeaderError),
    "overlap": (pack({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)), InvalidHeaderError),
    "the same data twice": (pack({"a": F32, "b": F32}, DATA), InvalidHeaderError),
    "hole": (pack({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)), InvalidHeaderError),
    "hole at the start": (pack({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16)), InvalidHeaderError),
    "trailing byte": (pack({"t": F32}, DATA + b"\0"), InvalidHeaderError),
    "only data": (pack({}, DATA), InvalidHeaderError),
}
# Where the reference is more lenient than we are: its parser takes the last of two equal names.
LENIENT_REFERENCE = {"a name twice", "a key of an entry twice"}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_header_is_refused(tmp_path: Path, fault: str) -> None:
    content, error = FAULTS[fault]
    file = tmp_path / "t.safetensors"
    file.write_bytes(content)
    with pytest.raises(error) as caught:
        read_header(file)
    assert type(caught.value) is error
    assert file.name in caught.value.thing
    if fault not in LENIENT_REFERENCE:
        with pytest.raises((SafetensorError, OSError)):
            open_with_reference(file)


def test_header_longer_than_the_reference_allows(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(file, 100_000_200)  # sparse
    with pytest.raises(InvalidHeaderError, match="100000001"):
        read_header(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_header(tmp_path / "t.safetensors")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
VALID = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A valid file with bytes changed, or a value somewhere in its header replaced, renamed or dropped."""
    data = bytes(range(34))
    if draw(st.booleans()):
        content = bytearray(pack(VALID, data))
        for _ in range(draw(st.integers(1, 3))):
            position = draw(st.integers(0, len(content) - 1))
            kind = draw(st.sampled_from(["change", "remove", "insert", "cut"]))
            if kind == "change":
                content[position] = draw(st.integers(0, 255))
            elif kind == "remove" and len(content) > 1:
                del content[position]
            elif kind == "insert":
                content.insert(position, draw(st.integers(0, 255)))
            else:
                del content[max(1, position) :]
        return bytes(content)
    header: dict[str, Any] = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(header)))
        value = draw(st.one_of(JSON_VALUES, st.sampled_from(["F32", "I8", [0, 24], [24, 32], [6], [0, 0], [3, 2]])))
        if isinstance(header[name], dict) and header[name] and draw(st.integers(0, 3)):
            header[name][draw(st.sampled_from(sorted(header[name])))] = value
        else:
            header[name] = value
    if draw(st.booleans()):
        header[draw(st.text(max_size=3))] = header.pop(draw(st.sampled_from(sorted(header))))
    return pack(header, data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=mutated_files())
def test_mutated_file_is_read_right_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mutated.safetensors"
    file.write_bytes(content)
    try:
        header = read_header(file)
    except RefusalError:
        return
    with TensorReader() as reader:
        read = {name: bytes(reader.rows(tensor, 0, tensor.rows)) for name, tensor in header.items()}
    # What was read covers the data exactly, in order: nothing outside of it and nothing twice.
    _, data = unpack(file)
    assert b"".join(read.values()) == data
    try:
        expected = open_with_reference(file)
    except (SafetensorError, OSError, RuntimeError, AttributeError, KeyError):
        return  # the reference checks the metadata's types too, and torch lacks some of the format's dtypes
    assert read == {name: raw_bytes(tensor) for name, tensor in expected.items()}
