"""Reading of safetensors folders, against the format's own loader, and every fault of a folder by its named error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporter.errors import (
    CheckpointError,
    InvalidHeaderError,
    MissingFileError,
    MissingShardError,
    RefusalError,
    TruncatedFileError,
    UnsafePathError,
)
from exporter.inputs.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_header
from exporter.inputs.tensor_reader import TensorReader
from tests.folders import copy, model_tensors, pack, raw_bytes

MakeBase = Callable[..., Path]

SHAPES = [(), (1,), (7,), (3, 5), (1, 6), (6, 1), (2, 3, 4), (0, 4)]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_reference_loader(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    file = tmp_path / "t.safetensors"
    save_file({"before": torch.randn(3), "t": torch.randn(shape).to(dtype), "z": torch.randn(2, 2)}, file)
    expected = load_file(file)["t"]
    tensor = read_header(file)["t"]
    assert tensor.shape == tuple(expected.shape)
    assert (tensor.rows, tensor.columns) == (expected.numel() // max(1, tensor.columns), shape[-1] if shape else 1)
    rows = expected.reshape(tensor.rows, tensor.columns)
    with TensorReader() as reader:
        for first in range(tensor.rows):
            for count in range(1, tensor.rows - first + 1):
                assert bytes(reader.rows(tensor, first, count)) == raw_bytes(rows[first : first + count])
        assert bytes(reader.rows(tensor, 0, tensor.rows)) == raw_bytes(expected)


def test_header_is_in_the_order_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    entry = {"dtype": "F32", "shape": [1]}
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry | {"data_offsets": [4, 8]},
        "c": entry | {"data_offsets": [8, 12]},
        "a": entry | {"data_offsets": [0, 4]},
    }
    file.write_bytes(pack(header, bytes(12)))
    assert list(read_header(file)) == ["a", "b", "c"]


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "folder"])
def test_sharded_base_equals_reference(make_base: MakeBase, tmp_path: Path, indexed: bool) -> None:
    folder = copy(make_base("qwen3", max_shard_size="60KB"), tmp_path / "base")
    if not indexed:
        (folder / INDEX_NAME).unlink()
    expected = model_tensors(folder)
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.shards) > 2
    assert checkpoint.tensors.keys() == expected.keys()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    with TensorReader() as reader:
        for name, tensor in checkpoint.tensors.items():
            assert bytes(reader.rows(tensor, 0, tensor.rows)) == raw_bytes(expected[name]), name


def test_folder_of_links_is_read(make_base: MakeBase, tmp_path: Path) -> None:
    # A hub cache is one: the links lead out of the folder.
    base = make_base("qwen3", max_shard_size="60KB")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    assert Checkpoint.open(folder).tensors.keys() == Checkpoint.open(base).tensors.keys()


def test_adapter_files_beside_the_base_are_left_alone(make_base: MakeBase, tmp_path: Path) -> None:
    folder = copy(make_base(), tmp_path / "base")
    (folder / SINGLE_NAME).rename(folder / "weights.safetensors")
    save_file({"stray": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert "stray" not in Checkpoint.open(folder).tensors


def test_files_are_not_mapped_while_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"t": torch.randn(64, 256)}, file)
    tensor = read_header(file)["t"]
    with TensorReader() as reader:
        held = [reader.rows(tensor, first, 1) for first in range(64)]
        maps = Path("/proc/self/maps").read_text()
        assert str(file) not in maps
        assert len(held) == 64
    # The check itself can fail: a mapping does show there.
    with safe_open(file, "pt") as opened:
        shown = opened.get_slice("t")
        assert str(file) in Path("/proc/self/maps").read_text()
        del shown


def test_reader_opens_each_file_once_and_closes_it(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"t": torch.arange(4096, dtype=torch.float32).view(1024, 4)}, file)
    tensor, expected = read_header(file)["t"], load_file(file)["t"]

    def descriptors() -> int:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(1 for link in links if link.is_symlink() and os.path.realpath(link) == str(file))

    with TensorReader() as reader, ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: bytes(reader.rows(tensor, row, 1)), range(1024)))
        assert read == [raw_bytes(expected[row]) for row in range(1024)]
        assert descriptors() == 1
    assert descriptors() == 0


def test_reads_past_the_tensor_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"a": torch.zeros(2, 4), "b": torch.ones(2, 4)}, file)
    with TensorReader() as reader:
        for first, count in ((0, 3), (2, 1), (-1, 1)):
            with pytest.raises(CheckpointError):
                reader.rows(read_header(file)["a"], first, count)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"t": torch.zeros(64, 64)}, file)
    tensor = read_header(file)["t"]
    os.truncate(file, file.stat().st_size - 1)
    with TensorReader() as reader:
        assert len(reader.rows(tensor, 0, 63)) == 63 * 256
        with pytest.raises(TruncatedFileError):
            reader.rows(tensor, 63, 1)


# --- faults of a folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_base: MakeBase, tmp_path: Path) -> Path:
    return copy(make_base("qwen3", max_shard_size="60KB"), tmp_path / "base")


def edit_weight_map(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/hostname", "sub/inside.safetensors", "a\\b.safetensors", "", ".", ".."]
)
def test_index_that_names_a_path_is_refused(sharded: Path, shard: str) -> None:
    inside = sharded / "sub"
    inside.mkdir()
    first = sorted(sharded.glob("*.safetensors"))[0]
    for copied in (sharded.parent / "outside.safetensors", inside / "inside.safetensors"):
        shutil.copy(first, copied)
    edit_weight_map(sharded, lambda entries: entries.update({next(iter(entries)): shard}))
    with pytest.raises(UnsafePathError):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "folder"])
def test_missing_shard(sharded: Path, indexed: bool) -> None:
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    if not indexed:
        (sharded / INDEX_NAME).unlink()
    with pytest.raises(MissingShardError) as caught:
        Checkpoint.open(sharded)
    assert "model-" in str(caught.value)


def test_missing_shard_with_another_file_in_its_place(sharded: Path) -> None:
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    (sharded / INDEX_NAME).unlink()
    save_file({"other": torch.zeros(1)}, sharded / "other.safetensors")
    with pytest.raises(MissingShardError):
        Checkpoint.open(sharded)


def test_file_names_with_of_in_them(make_base: MakeBase, tmp_path: Path) -> None:
    folder = copy(make_base(), tmp_path / "base")
    (folder / SINGLE_NAME).rename(folder / "best-of-all.safetensors")
    assert "model.norm.weight" in Checkpoint.open(folder).tensors


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(TruncatedFileError) as caught:
        Checkpoint.open(sharded)
    assert shard.name in caught.value.thing


def test_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))

    def move(entries: dict[str, Any]) -> None:
        entries["model.norm.weight"] = next(name for name in shards if name != entries["model.norm.weight"])

    edit_weight_map(sharded, move)
    with pytest.raises(InvalidHeaderError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.thing == "model.norm.weight"


def test_tensor_in_no_shard(sharded: Path) -> None:
    shard = sorted(file.name for file in sharded.glob("*.safetensors"))[0]
    edit_weight_map(sharded, lambda entries: entries.update({"model.extra.weight": shard}))
    with pytest.raises(InvalidHeaderError, match="no shard"):
        Checkpoint.open(sharded)


def test_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    edit_weight_map(sharded, lambda entries: entries.pop("model.norm.weight"))
    with pytest.raises(InvalidHeaderError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.thing == "model.norm.weight"


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "folder"])
def test_tensor_in_two_shards(sharded: Path, indexed: bool) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    first = load_file(shards[0])
    name = next(iter(first))
    save_file(load_file(shards[1]) | {name: first[name]}, shards[1])
    if not indexed:
        (sharded / INDEX_NAME).unlink()
    with pytest.raises(InvalidHeaderError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.thing == name


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "model"}', "\ufeff{}"],
)
def test_index_that_is_none(sharded: Path, index: str) -> None:
    (sharded / INDEX_NAME).write_text(index)
    with pytest.raises(InvalidHeaderError):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "value", [None, 3, ["a"], {"a": 1}, "x" * 300 + ".safetensors", "a\0b"], ids=lambda v: repr(v)[:9]
)
def test_index_with_values_that_are_no_file_names(sharded: Path, value: Any) -> None:
    edit_weight_map(sharded, lambda entries: entries.update({next(iter(entries)): value}))
    with pytest.raises(RefusalError):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", [None, "{", "[1]", '"text"', "[" * 100_000, b"\xff\xfe{"])
def test_config_that_is_none(make_base: MakeBase, tmp_path: Path, content: str | bytes | None) -> None:
    folder = copy(make_base(), tmp_path / "base")
    config = folder / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MissingFileError if content is None else InvalidHeaderError) as caught:
        Checkpoint.open(folder)
    assert "config.json" in caught.value.thing


def test_folder_without_safetensors_says_what_is_there(make_base: MakeBase, tmp_path: Path) -> None:
    folder = copy(make_base(), tmp_path / "base")
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"pytorch_model\.bin"):
        Checkpoint.open(folder)


def test_folder_that_is_none(make_base: MakeBase, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", make_base() / "config.json"):
        with pytest.raises(MissingFileError, match="no such folder"):
            Checkpoint.open(path)


def test_index_beside_a_single_file(make_base: MakeBase, sharded: Path) -> None:
    # transformers takes model.safetensors and leaves the index alone: so must we, or refuse.
    other = make_base("qwen3", seed=7)
    shutil.copy(other / SINGLE_NAME, sharded / SINGLE_NAME)
    try:
        checkpoint = Checkpoint.open(sharded)
    except RefusalError:
        return
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(sharded, dtype="auto").state_dict()
    norm = checkpoint.tensors["model.norm.weight"]
    with TensorReader() as reader:
        assert bytes(reader.rows(norm, 0, norm.rows)) == raw_bytes(loaded["model.norm.weight"])
