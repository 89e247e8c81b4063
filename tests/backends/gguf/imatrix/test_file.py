"""Importance matrices: the arithmetic of llama-quantize, and files that are whole, damaged, or something else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.gguf.imatrix.file import (
    ImatrixError,
    Importance,
    check_fit,
    imatrix_bytes,
    imatrix_nbytes,
    read_imatrix,
)

NAMES = ("blk.0.attn_q.weight", "blk.10.attn_q.weight", "blk.2.ffn_down.weight", "blk.2.ffn_up_exps.weight")


def _entry(groups: int = 1, columns: int = 8, seed: int = 0) -> Importance:
    rng = np.random.default_rng(seed)
    sums = rng.exponential(size=(groups, columns)).astype(np.float32)
    return Importance(sums, rng.integers(1, 1000, groups).astype(np.float32))


def _entries() -> dict[str, Importance]:
    sizes = ((1, 8), (1, 8), (1, 13), (3, 8))
    return {name: _entry(*size, seed=seed) for seed, (name, size) in enumerate(zip(NAMES, sizes, strict=True))}


# --- the vector ----------------------------------------------------------------------------------------------------


def test_the_mean_is_one_float32_division() -> None:
    entry = Importance(np.array([[1, 2, 1e-30], [5, 7, 3e38]], np.float32), np.array([3, 7], np.float32))
    expected = [np.float32(1) / np.float32(3), np.float32(2) / np.float32(3), np.float32(1e-30) / np.float32(3)]
    expected += [np.float32(5) / np.float32(7), np.float32(1), np.float32(3e38) / np.float32(7)]
    assert entry.mean().dtype == np.float32
    assert entry.mean().tolist() == [float(value) for value in expected]


def test_a_group_without_a_count_is_all_ones_and_counted() -> None:
    entry = Importance(np.full((3, 2), 8, np.float32), np.array([0, 4, 0.49], np.float32))
    assert entry.mean().tolist() == [1, 1, 2, 2, 1, 1]
    assert entry.unseen == 2


@pytest.mark.parametrize(("count", "taken"), [(2.5, 3), (2.49, 2), (0.5, 1), (1.5, 2), (8388609.0, 8388609)])
def test_counts_are_rounded_as_lround_rounds(count: float, taken: int) -> None:
    entry = Importance(np.full((1, 1), 6, np.float32), np.array([count], np.float32))
    assert entry.mean()[0] == np.float32(6) / np.float32(taken)


# --- writing and reading -------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file, entries = tmp_path / "i.gguf", _entries()
    file.write_bytes(imatrix_bytes(entries, ("a", "b"), 5, 512))
    found = read_imatrix(file)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a", "b"), 5, 512)
    assert found.entries.keys() == entries.keys()
    for name, entry in entries.items():
        assert np.array_equal(found.entries[name].in_sum2, entry.in_sum2)
        assert np.array_equal(found.entries[name].counts, entry.counts)
        assert np.array_equal(found.entries[name].mean(), entry.mean())


def test_gguf_s_own_reader_reads_it_sorted_by_name(tmp_path: Path) -> None:
    (tmp_path / "i.gguf").write_bytes(imatrix_bytes(_entries(), (), 0, 512))
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    names = [f"{name}.{part}" for name in sorted(NAMES) for part in ("in_sum2", "counts")]
    assert [tensor.name for tensor in reader.tensors] == names
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.2.ffn_up_exps.weight.in_sum2"] == [8, 3]
    assert shapes["blk.2.ffn_up_exps.weight.counts"] == [1, 3]
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [8]
    assert shapes["blk.0.attn_q.weight.counts"] == [1]


def test_gguf_s_own_reader_finds_the_same_values_and_keys(tmp_path: Path) -> None:
    entries = _entries()
    (tmp_path / "i.gguf").write_bytes(imatrix_bytes(entries, ("a", "b"), 5, 512))
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    stored = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    for name, entry in entries.items():
        assert stored[f"{name}.in_sum2"].tobytes() == entry.in_sum2.tobytes()
        assert stored[f"{name}.counts"].tobytes() == entry.counts.tobytes()
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == {
        "general.type": "imatrix", "imatrix.datasets": ["a", "b"], "imatrix.chunk_count": 5, "imatrix.chunk_size": 512,
    }  # fmt: skip


def test_the_bytes_depend_on_no_order() -> None:
    entries = _entries()
    again = dict(reversed(entries.items()))
    assert list(again) != list(entries)
    assert imatrix_bytes(entries, ("a",), 1, 2) == imatrix_bytes(again, ("a",), 1, 2)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.dictionaries(st.text(max_size=20), st.tuples(st.integers(1, 4), st.integers(1, 40)), max_size=5),
    datasets=st.lists(st.text(max_size=20), max_size=3),
)
def test_the_size_is_known_from_the_shapes(shapes: dict[str, tuple[int, int]], datasets: list[str]) -> None:
    entries = {name: _entry(*shape) for name, shape in shapes.items()}
    assert imatrix_nbytes(shapes, datasets, 3, 512) == len(imatrix_bytes(entries, datasets, 3, 512))


# --- the old form --------------------------------------------------------------------------------------------------


def _legacy(*entries: tuple[str, int, list[float]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)))
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts) + tail


def test_the_old_form_is_read(tmp_path: Path) -> None:
    file = tmp_path / "old.dat"
    tail = struct.pack("<ii", 9, 5) + b"a.txt"
    file.write_bytes(_legacy(("x.weight", 4, [2, 6, 10]), ("y.weight", 0, [3, 5]), tail=tail))
    found = read_imatrix(file)
    assert (found.chunks, found.datasets) == (9, ("a.txt",))
    assert found.entries["x.weight"].mean().tolist() == [0.5, 1.5, 2.5]
    # Without calls the values are the means.
    assert found.entries["y.weight"].mean().tolist() == [3, 5]


def test_the_oldest_form_ends_after_its_entries(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(_legacy(("x.weight", 4, [2, 6])))
    found = read_imatrix(tmp_path / "old.dat")
    assert (found.chunks, found.datasets, list(found.entries)) == (0, (), ["x.weight"])


# --- refusals ------------------------------------------------------------------------------------------------------


def _refused(file: Path) -> ImatrixError:
    with pytest.raises(ImatrixError) as caught:
        read_imatrix(file)
    return caught.value


def test_no_file(tmp_path: Path) -> None:
    assert "No such file" in _refused(tmp_path / "none.gguf").found
    assert _refused(tmp_path).thing == str(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole, file = imatrix_bytes(_entries(), ("text",), 5, 512), tmp_path / "i.gguf"
    # The last bytes are padding; what comes before the padding cannot be missed.
    for length in [*range(0, len(whole) - 32, 7), len(whole) - 24]:
        file.write_bytes(whole[:length])
        assert _refused(file).thing, length


def test_every_truncation_of_the_old_form_is_refused(tmp_path: Path) -> None:
    body = _legacy(("x.weight", 4, [2, 6, 10]), ("y.weight", 1, [3, 5]))
    tail, file = struct.pack("<ii", 9, 5) + b"a.txt", tmp_path / "old.dat"
    for length in range(len(body + tail)):
        file.write_bytes((body + tail)[:length])
        if length in (len(body), len(body) + 4):
            # Where the first versions end, and the ones that knew no dataset.
            assert read_imatrix(file).entries
        else:
            assert "file of the old form" in _refused(file).found, length


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 64, b"\xff" * 64, b"text of some kind, long enough to be an entry of many values",
        struct.pack("<i", 2**31 - 1), _legacy(("x.weight", 1, [])),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    assert _refused(tmp_path / "f").thing == str(tmp_path / "f")


def _written(file: Path, tensors: dict[str, Any], general_type: str = "imatrix", without: str | None = None) -> Path:
    """A file by gguf's own writer."""
    writer = gguf.GGUFWriter(file, "none")
    writer.add_string("general.type", general_type)
    if without != "datasets":
        writer.add_array("imatrix.datasets", ["text"])
    if without != "chunk_count":
        writer.add_uint32("imatrix.chunk_count", 1)
    if without != "chunk_size":
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _two(sums: Any, counts: Any, name: str = "x.weight") -> dict[str, Any]:
    return {f"{name}.in_sum2": np.asarray(sums, np.float32), f"{name}.counts": np.asarray(counts, np.float32)}


def test_a_file_by_gguf_s_writer_is_read(tmp_path: Path) -> None:
    found = read_imatrix(_written(tmp_path / "i.gguf", _two([[2, 4], [6, 8]], [[1], [2]])))
    assert found.entries["x.weight"].mean().tolist() == [2, 4, 3, 4]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda file: _written(file, _two([1, 2], [1]), "model"), "type 'model'"),
        (lambda file: _written(file, _two([1, 2], [1]), without="datasets"), "imatrix.datasets"),
        (lambda file: _written(file, _two([1, 2], [1]), without="chunk_count"), "imatrix.chunk_count"),
        (lambda file: _written(file, _two([1, 2], [1]), without="chunk_size"), "imatrix.chunk_size"),
        (lambda file: _written(file, {}), "no entries"),
        (lambda file: _written(file, {"x.weight.in_sum2": np.ones(2, np.float32)}), "without its counts"),
        (lambda file: _written(file, {"x.weight.counts": np.ones(1, np.float32)}), "without its in_sum2"),
        (lambda file: _written(file, {"x.weight": np.ones(2, np.float32)}), "a tensor x.weight"),
        (lambda file: _written(file, _two([1, 2, 3], [1, 1])), "3 sums and 2 counts"),
        (
            lambda file: _written(file, {"x.in_sum2": np.ones(2, np.float16), "x.counts": np.ones(1, np.float32)}),
            "x in another type than F32",
        ),
    ],
)  # fmt: skip
def test_a_gguf_file_that_is_no_importance_matrix_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], named: str
) -> None:
    assert named in _refused(make(tmp_path / "i.gguf")).found


@pytest.mark.parametrize(
    ("sums", "counts", "found"),
    [
        ([1, float("nan")], [1], "NaN"),
        ([1, float("inf")], [1], "infinity"),
        ([1, 2], [float("nan")], "NaN"),
        ([1, -2], [1], "negative"),
        ([1, 2], [-1], "negative"),
        ([1, 2], [0], "count of zero"),
        ([1, 2], [0.4], "count of zero"),
        ([[1, 2], [3, 4]], [[0], [0]], "count of zero"),
    ],
)
def test_numbers_that_cannot_weigh_are_refused_by_name(tmp_path: Path, sums: Any, counts: Any, found: str) -> None:
    error = _refused(_written(tmp_path / "i.gguf", _two([1, 2], [1], "good.weight") | _two(sums, counts)))
    assert error.thing == "imatrix entry x.weight"
    assert found in error.found
    broken = Importance(np.asarray(sums, np.float32).reshape(len(counts), -1), np.asarray(counts, np.float32).ravel())
    with pytest.raises(ImatrixError, match=r"x\.weight"):
        imatrix_bytes({"x.weight": broken}, (), 1, 512)


SHAPES = {"a.weight": (16, 8), "b.weight": (3, 16, 8)}


def test_entries_that_fit() -> None:
    check_fit({"a.weight": _entry(), "b.weight": _entry(3)}, SHAPES)
    # As the old form has them: all experts in one.
    check_fit({"b.weight": _entry(1, 24)}, SHAPES)


@pytest.mark.parametrize(
    ("name", "entry", "found"),
    [
        ("c.weight", _entry(), "no such tensor"),
        ("a.weight", _entry(columns=16), "16 values"),
        ("a.weight", _entry(3), "24 values"),
        ("b.weight", _entry(), "8 values"),
    ],
)
def test_entries_of_another_model_are_refused_by_name(name: str, entry: Importance, found: str) -> None:
    with pytest.raises(ImatrixError) as caught:
        check_fit({name: entry}, SHAPES)
    assert caught.value.thing == f"imatrix entry {name}"
    assert found in caught.value.found
