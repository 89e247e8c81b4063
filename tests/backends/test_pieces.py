"""Stored tensors that are made of pieces: where each row goes, and what becomes of its values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import Arrangement, Piece, RowRun, stack, whole


def test_a_whole_tensor_is_stored_row_by_row() -> None:
    (piece,) = whole("w")
    assert list(piece.inside(3, 4)) == [RowRun(3, 3, 4)]


def test_experts_are_stored_one_after_the_other() -> None:
    pieces = stack(["e0", "e1", "e2"], 10)
    assert [piece.source for piece in pieces] == ["e0", "e1", "e2"]
    assert list(pieces[2].inside(4, 3)) == [RowRun(4, 24, 3)]
    assert list(pieces[2].inside(8, 100)) == [RowRun(8, 28, 2)]


@given(
    runs=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_every_row_arrives_once_however_it_is_cut(runs: list[int], cuts: list[int], seed: int) -> None:
    """Runs in another order, offered in blocks that end where they like."""
    total = sum(runs)
    starts = np.cumsum([0, *runs[:-1]]).tolist()
    order = np.random.default_rng(seed).permutation(len(runs)).tolist()
    stored, placed = 0, []
    for number in order:
        placed.append(RowRun(starts[number], stored, runs[number]))
        stored += runs[number]
    piece = Piece("w", tuple(placed))
    source, found = np.arange(total), np.full(total, -1)
    first = 0
    while first < total:
        count = min(cuts[first % len(cuts)], total - first)
        for run in piece.inside(first, count):
            assert (found[run.stored : run.stored + run.count] == -1).all()
            found[run.stored : run.stored + run.count] = source[run.source : run.source + run.count]
        first += count
    expected = np.concatenate([source[starts[number] : starts[number] + runs[number]] for number in order])
    assert (found == expected).all()


@pytest.mark.parametrize("value", ["identity", "neg_exp", "plus_one"])
@pytest.mark.parametrize("order", [None, (2, 0, 3, 1)])
def test_values_and_columns_go_there_and_back(value: str, order: tuple[int, ...] | None) -> None:
    arrangement = Arrangement(order, value)  # type: ignore[arg-type]
    merged = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = merged.clone()
    stored = arrangement.apply(merged)
    assert torch.equal(merged, before)
    wanted = {"identity": merged, "neg_exp": -torch.exp(merged), "plus_one": merged + 1}[value]
    for column, source in enumerate(order or range(4)):
        assert torch.equal(stored[:, column], wanted[:, source])
    np.testing.assert_allclose(arrangement.undo(stored.numpy()), merged.numpy(), rtol=1e-5, atol=1e-6)


def test_a_checksum_goes_by_the_merged_tensor_where_that_is_stored_as_a_whole() -> None:
    def plan(pieces: tuple[Piece, ...]) -> TensorPlan:
        return TensorPlan("stored", pieces, (4, 4), "F32", "file", 0, 16)

    assert plan(whole("merged")).checksum_name == "merged"
    assert plan(stack(["e0", "e1"], 2)).checksum_name == "stored"
    assert plan((Piece("merged", (RowRun(4, 0, 4),)),)).checksum_name == "stored"
