"""Checksums of tensors whose rows come in any order and in any pieces."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from exporter.backends.writing.checksums import TensorChecksums, as_text, joined, row_checksums

Rows = npt.NDArray[np.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Rows, list[tuple[int, int]]]:
    """Rows, and the pieces that they are cut into."""
    rows, width, seed = draw(st.integers(1, 12)), draw(st.integers(1, 40)), draw(st.integers(0, 2**32 - 1))
    data = np.random.default_rng(seed).integers(0, 256, (rows, width), dtype=np.uint8)
    cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=4))})
    return data, list(pairwise(cuts))


def by_zlib(data: Rows) -> str:
    """By the definition."""
    return f"{zlib.crc32(b''.join(zlib.crc32(row.tobytes()).to_bytes(4, 'little') for row in data)):08x}"


@given(tensors(), st.randoms())
def test_pieces_in_any_order_are_the_tensor(tensor: tuple[Rows, list[tuple[int, int]]], random: object) -> None:
    data, pieces = tensor
    running = 0
    for first, end in pieces:
        running = joined(row_checksums(data[first:end]), running)
    taken = TensorChecksums()
    random.shuffle(pieces)  # type: ignore[attr-defined]
    for first, end in pieces:
        taken.add("a", len(data), first, data[first:end])
    assert as_text(running) == taken.take("a") == by_zlib(data)


@given(tensors(), st.data())
def test_a_bit_or_a_swap_shows(tensor: tuple[Rows, list[tuple[int, int]]], draw: st.DataObject) -> None:
    data = tensor[0]
    changed = data.copy()
    row, column = (draw.draw(st.integers(0, size - 1)) for size in data.shape)
    changed[row, column] ^= 1 << draw.draw(st.integers(0, 7))
    assert by_zlib(changed) == as_text(joined(row_checksums(changed))) != as_text(joined(row_checksums(data)))
    if not np.array_equal(data[0], data[-1]):
        swapped = data.copy()
        swapped[[0, -1]] = data[[-1, 0]]
        assert joined(row_checksums(swapped)) != joined(row_checksums(data))


def test_tensors_are_told_apart_and_taken_once() -> None:
    taken, one, other = TensorChecksums(), np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)
    taken.add("one", 2, 0, one)
    taken.add("other", 2, 0, other)
    assert (taken.take("one"), taken.take("other")) == (by_zlib(one), by_zlib(other))
    assert taken.take("one") is None


def test_a_tensor_that_is_not_whole_has_none() -> None:
    taken = TensorChecksums()
    taken.add("one", 3, 0, np.zeros((2, 3), np.uint8))
    assert taken.take("one") is None
