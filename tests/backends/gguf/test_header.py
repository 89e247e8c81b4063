"""The packed header, against the gguf package's own writer and reader."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS
from exporter.backends.gguf.file_types import BLOCK_SIZES, row_bytes
from exporter.backends.gguf.header import ALIGNMENT, TensorInfo, Value, pack_header, pad

NUMBERS = {
    "uint32": gguf.GGUFValueType.UINT32,
    "int32": gguf.GGUFValueType.INT32,
    "float32": gguf.GGUFValueType.FLOAT32,
    "bool": gguf.GGUFValueType.BOOL,
    "uint64": gguf.GGUFValueType.UINT64,
    "string": gguf.GGUFValueType.STRING,
}

TEXTS = st.text(max_size=40) | st.sampled_from(
    ["", "a", "<|im_start|>", "Ġéß", "我想", "🦙" * 9, "\0\n\t", "[PAD151936]"]
)
KEYS = st.text(min_size=1, max_size=20)
VALUES = st.one_of(
    st.builds(Value, st.just("uint32"), st.integers(0, 2**32 - 1)),
    st.builds(Value, st.just("int32"), st.integers(-(2**31), 2**31 - 1)),
    st.builds(Value, st.just("uint64"), st.integers(0, 2**64 - 1)),
    st.builds(Value, st.just("float32"), st.floats(width=32, allow_nan=False)),
    st.builds(Value, st.just("bool"), st.booleans()),
    st.builds(Value, st.just("string"), TEXTS),
    st.builds(Value, st.just("[string]"), st.lists(TEXTS, min_size=1, max_size=9)),
    st.builds(Value, st.just("[int32]"), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9)),
)


@st.composite
def _shaped(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    """A type, and a shape whose rows are whole blocks of it."""
    kind = draw(st.sampled_from(sorted(BLOCK_SIZES)))
    outer = draw(st.lists(st.integers(1, 5), max_size=2))
    return kind, (*outer, BLOCK_SIZES[kind][0] * draw(st.integers(1, 4)))


TENSORS = st.dictionaries(KEYS, _shaped(), max_size=5)


def _infos(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[list[TensorInfo], int]:
    """Tensors one after the other, each aligned; and where the last one ends."""
    infos, offset = [], 0
    for name, (kind, shape) in tensors.items():
        infos.append(TensorInfo(name, shape, TYPE_NUMBERS[kind], offset))
        offset = pad(offset + int(np.prod(shape[:-1])) * row_bytes(kind, shape[-1]))
    return infos, offset


def _written(metadata: dict[str, Value], tensors: dict[str, tuple[str, tuple[int, ...]]], file: Path) -> bytes:
    """What gguf.GGUFWriter writes for the same metadata and tensors, of zeros."""
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        if value.type.startswith("["):
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, NUMBERS[value.type[1:-1]])
        else:
            writer.add_key_value(key, value.value, NUMBERS[value.type])
    for name, (kind, shape) in tensors.items():
        data = np.zeros((*shape[:-1], row_bytes(kind, shape[-1])), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@settings(max_examples=150, deadline=None)
@given(metadata=st.dictionaries(KEYS, VALUES, max_size=6), tensors=TENSORS)
def test_header_is_what_the_gguf_writer_writes(
    metadata: dict[str, Value], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    infos, end = _infos(tensors)
    header = pack_header(metadata, infos)
    with tempfile.TemporaryDirectory() as folder:
        whole = _written(metadata, tensors, Path(folder) / "theirs.gguf")
    assert header + bytes(end) == whole
    assert len(header) % ALIGNMENT == 0


@settings(max_examples=40, deadline=None)
@given(metadata=st.dictionaries(KEYS, VALUES, max_size=6), tensors=TENSORS)
def test_reader_gives_back_what_was_packed(
    metadata: dict[str, Value], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    infos, end = _infos(tensors)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ours.gguf"
        file.write_bytes(pack_header(metadata, infos) + bytes(end))
        reader = gguf.GGUFReader(file)
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert {key: _contents(field) for key, field in fields.items()} == {
            key: value.value for key, value in metadata.items()
        }
        assert [(t.name, t.tensor_type.value, tuple(int(n) for n in t.shape)[::-1]) for t in reader.tensors] == [
            (info.name, info.type_number, info.shape) for info in infos
        ]


def _contents(field: Any) -> Any:
    value = field.contents()
    return [int(item) if isinstance(item, np.integer) else item for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("size", "padded"), [(0, 0), (1, 32), (31, 32), (32, 32), (33, 64)])
def test_pad(size: int, padded: int) -> None:
    assert pad(size) == padded
    assert gguf.GGUFWriter.ggml_pad(size, ALIGNMENT) == padded
