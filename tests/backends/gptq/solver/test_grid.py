"""The search for scales against exhaustive search, and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.gptq.solver.grid import CHUNK_ELEMENTS, Grid, GridError, nearest_steps, search_scales

BITS = st.sampled_from([2, 3, 4, 8])


def errors(columns: torch.Tensor, scales: torch.Tensor, zero: float, bits: int, weights: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of one row for each of many scales, in float64: the definition, nothing else."""
    x, s = columns.double()[:, None], scales.double()[None]
    codes = (torch.round(x / s) + zero).clamp(0, 2**bits - 1)
    return (weights.double()[:, None] * (x - s * (codes - zero)) ** 2).sum(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_symmetric_search_is_close_to_exhaustive(bits: int, signed: bool) -> None:
    torch.manual_seed(bits)
    columns, weights = torch.randn(128, 24), torch.rand(128) ** 4 + 1e-3
    columns[0, :] *= 3  # an outlier, where shrinking pays
    grid = Grid(bits, 128, signed_scales=signed)
    scales, zeros = search_scales(columns, grid, weights)
    assert torch.equal(zeros, torch.full((24,), float(2 ** (bits - 1))))
    assert signed or bool((scales > 0).all())
    peak = columns.abs().amax(0)
    excess = []
    for row in range(24):
        span = torch.linspace(0.1, 1.3, 4001) * peak[row] / 2 ** (bits - 1)
        tried = torch.cat([span, -span]) if signed else span
        best = errors(columns[:, row], tried, 2 ** (bits - 1), bits, weights)
        ours = errors(columns[:, row], scales[row : row + 1], 2 ** (bits - 1), bits, weights)
        excess.append((ours[0] / best.min()).item() - 1)
    # The exhaustive search tries 4,001 scales of each sign where ours tries 16 of one or both, and at 8 bits the
    # rounding of scales counts.
    assert sum(excess) / 24 < {2: 0.01, 3: 0.02, 4: 0.1, 8: 0.2}[bits]


@pytest.mark.parametrize("bits", [2, 4])
def test_importance_moves_the_scale_towards_what_matters(bits: int) -> None:
    torch.manual_seed(0)
    columns, weights = torch.randn(128, 64), torch.ones(128)
    weights[::4] = 100.0
    plain, zeros = search_scales(columns, Grid(bits, 128))
    weighted, _ = search_scales(columns, Grid(bits, 128), weights)

    def error(scales: torch.Tensor) -> float:
        miss = columns - scales * nearest_steps(columns, scales, zeros, Grid(bits, 128))
        return (weights[:, None] * miss**2).sum().item()

    assert error(weighted) < 0.97 * error(plain)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_beats_symmetric_where_the_weights_are_to_one_side(bits: int) -> None:
    torch.manual_seed(0)
    columns = torch.randn(128, 32) + 2
    found = {}
    for sym in (True, False):
        scales, zeros = search_scales(columns, Grid(bits, 128, sym))
        miss = columns - scales * nearest_steps(columns, scales, zeros, Grid(bits, 128, sym))
        found[sym] = (miss**2).sum().item()
    assert found[False] < 0.8 * found[True]


def test_negative_scale_where_the_largest_weight_is_positive() -> None:
    columns = torch.linspace(-0.5, 1, 32)[:, None]
    assert search_scales(columns, Grid(4, 32))[0] < 0
    assert search_scales(-columns, Grid(4, 32))[0] > 0
    assert search_scales(columns, Grid(4, 32, signed_scales=False))[0] > 0


@settings(max_examples=60, deadline=None)
@given(
    bits=BITS,
    sym=st.booleans(),
    signed=st.booleans(),
    width=st.sampled_from([1, 32, 33, 128, 300]),
    exponents=st.lists(st.integers(-44, 37), min_size=1, max_size=5),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 100),
)
def test_scales_are_normal_float16_whatever_the_weights(
    bits: int, sym: bool, signed: bool, width: int, exponents: list[int], shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(width, len(exponents) + 1, generator=generator).clamp(-3, 3) + shift
    columns = unit * torch.tensor([*(10.0**e for e in exponents), 0.0])
    scales, zeros = search_scales(columns, Grid(bits, -1, sym, signed), torch.rand(width, generator=generator))
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert bool(((scales.abs() >= 2**-14) & (scales.abs() <= 65504)).all())
    assert bool(((zeros >= 1) & (zeros <= 2**bits - 1) & (zeros == zeros.round())).all())
    codes = nearest_steps(columns, scales, zeros, Grid(bits, -1, sym, signed)) + zeros
    assert bool(((codes >= 0) & (codes <= 2**bits - 1)).all())
    assert torch.equal(codes[:, -1], zeros[-1].expand(width)), "a row of zeros is exactly zero"


def test_rows_do_not_depend_on_each_other_or_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    columns = torch.randn(128, 200)
    whole = search_scales(columns, Grid(4, 128))[0]
    assert torch.equal(whole[64:128], search_scales(columns[:, 64:128].contiguous(), Grid(4, 128))[0])
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 128 * 64)
    assert torch.equal(whole, search_scales(columns, Grid(4, 128))[0])


@pytest.mark.parametrize(("bits", "group_size"), [(1, 128), (5, 128), (4, 0), (4, 16), (4, 256)])
def test_refuses_a_grid_that_does_not_exist(bits: int, group_size: int) -> None:
    with pytest.raises(GridError, match="found"):
        Grid(bits, group_size)


def test_refuses_a_ragged_last_group() -> None:
    assert Grid(4, 32).groups(96) == 3
    assert Grid(4, -1).groups(100) == 1
    for group_size, columns in ((32, 100), (128, 64), (64, 0), (-1, 0)):
        with pytest.raises(ValueError, match="input features"):
            Grid(4, group_size).groups(columns)
