"""The solver against textbook GPTQ and coordinate descent, written out in float64, and what any solution must keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.gptq.solver.factor import FIRST_RETRY_DAMP, FactorizationError, Ordering, SolverError, factorize
from exporter.backends.gptq.solver.grid import Grid, search_scales
from exporter.backends.gptq.solver.solver import Quantized, dequantize, round_to_nearest, solve
from exporter.errors import NonFiniteTensorError

ORDERINGS: tuple[Ordering, ...] = ("none", "groups", "desc_act")


def correlated(columns: int, seed: int = 0, tokens: int = 0) -> torch.Tensor:
    """Second moments of inputs that lean on a few directions, with columns of very different size: float32."""
    generator = torch.Generator().manual_seed(seed)
    count = tokens or 4 * columns
    inputs = torch.randn(count, columns // 4 + 1, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns // 4 + 1, columns, generator=generator, dtype=torch.float64)
    inputs += torch.randn(count, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.rand(columns, generator=generator, dtype=torch.float64) ** 2 + 0.05
    return (inputs.T @ inputs / count).float()


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) * 0.05


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    exact = hessian.double()
    return exact + damp * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)


def objective(weight: torch.Tensor, quantized: Quantized, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    miss = weight.double() - dequantize(quantized).double()
    return torch.trace(miss @ hessian.double() @ miss.T).item()


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, order: list[int], grid: Grid, ours: Quantized
) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, an inversion for every column: codes, by place.

    Scales are searched for on the updated weights and compared. Then ours are used: candidates that are as good as each
    other may be told apart differently in float32.
    """
    w, h = weight.double()[:, order], hessian[order][:, order]
    codes, width = torch.zeros_like(w), grid.width(w.shape[1])
    inverses = [torch.linalg.inv(h[column:, column:]) for column in range(w.shape[1])]
    for i, inverse in enumerate(inverses):
        group = int(ours.g_idx[order[i]])
        scale, zero = ours.scales[:, group].double(), ours.zeros[:, group].double()
        if i % width == 0:
            costs = torch.stack([1 / later[0, 0] for later in inverses[i : i + width]]).float()
            scales, zeros = search_scales(w[:, i : i + width].T.float().contiguous(), grid, costs)
            assert torch.allclose(scales.double(), scale, rtol=2e-2 if grid.bits == 8 else 2e-3)
            assert torch.equal(zeros.double(), zero)
        codes[:, i] = (torch.round(w[:, i] / scale) + zero).clamp(0, grid.max_code)
        error = w[:, i] - scale * (codes[:, i] - zero)
        w[:, i:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize(
    ("columns", "group_size", "bits", "sym"),
    [(160, 32, 4, True), (192, 64, 2, False), (192, 64, 8, True), (256, 128, 3, True), (150, -1, 4, False)],
)
def test_against_the_textbook(ordering: Ordering, columns: int, group_size: int, bits: int, sym: bool) -> None:
    hessian, weight, grid = correlated(columns), weights(6, columns), Grid(bits, group_size, sym)
    factor = factorize(hessian, group_size, ordering, damp=0.05)
    ours = solve(weight, factor, grid, sweeps=0)
    order = factor.order.tolist()
    for place, column in enumerate(order):
        position = place if ordering == "desc_act" else column
        assert int(ours.g_idx[column]) == position // grid.width(columns)
    codes = textbook(weight, damped(hessian, 0.05), order, grid, ours)
    # A tie that rounds the other way in float32 moves the codes after it: rare, and rarer the fewer the bits.
    assert (ours.codes[:, order].double() == codes).double().mean().item() > (0.99 if bits < 8 else 0.95)


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("sym", [True, False])
def test_sweep_against_coordinate_descent(ordering: Ordering, sym: bool) -> None:
    hessian, weight, grid = correlated(256), weights(16, 256), Grid(3, 64, sym)
    factor = factorize(hessian, 64, ordering, damp=0.05)
    start, ours = (solve(weight, factor, grid, sweeps=sweeps) for sweeps in (0, 1))
    assert torch.equal(start.scales, ours.scales)
    exact, codes = damped(hessian, 0.05), start.codes.double()
    scales = start.scales[:, start.g_idx.long()].double()
    zeros = start.zeros[:, start.g_idx.long()].double()
    for column in factor.order.tolist():
        miss = weight.double() - scales * (codes - zeros)
        miss[:, column] = 0
        # The value that takes the derivative by this column to zero, all others fixed.
        best = weight[:, column].double() + miss @ exact[:, column] / exact[column, column]
        codes[:, column] = (torch.round(best / scales[:, column]) + zeros[:, column]).clamp(0, 7)
    assert (start.codes.double() != codes).sum().item() >= 20, "the sweep has something to do"
    assert (ours.codes.double() == codes).double().mean().item() > 0.998


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    sym=st.booleans(),
    ordering=st.sampled_from(ORDERINGS),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_loss_is_what_it_says_and_less_than_rounding(
    bits: int, group_size: int, sym: bool, ordering: Ordering, blocks: int, seed: int
) -> None:
    columns = blocks * 128 if group_size != -1 else blocks * 100 + 1
    hessian, weight, grid = correlated(columns, seed), weights(8, columns, seed), Grid(bits, group_size, sym)
    factor = factorize(hessian, group_size, ordering, damp=0.02)
    target = damped(hessian, 0.02)
    losses = []
    for sweeps in (0, 1, 3):
        quantized = solve(weight, factor, grid, sweeps=sweeps)
        losses.append(objective(weight, quantized, target))
        assert quantized.loss * weight.numel() == pytest.approx(losses[-1], rel=1e-3)
    assert losses[0] > losses[1] >= losses[2] * 0.9999
    assert losses[1] < 0.9 * objective(weight, round_to_nearest(weight, grid), target)
    assert torch.equal(dequantize(quantized).half().isfinite(), torch.ones_like(weight, dtype=torch.bool))


@pytest.mark.parametrize("ordering", ["none", "groups"])
def test_codes_come_back_in_the_columns_own_order(ordering: Ordering) -> None:
    """With a diagonal Hessian columns have nothing to make up for: any order gives what rounding gives."""
    diagonal = torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.1
    weight, grid = weights(16, 256), Grid(4, 64)
    ours = solve(weight, factorize(torch.diag(diagonal), 64, ordering, damp=0), grid)
    rounded = round_to_nearest(weight, grid, diagonal)
    assert torch.equal(ours.g_idx, torch.arange(256, dtype=torch.int32) // 64)
    assert torch.allclose(ours.scales, rounded.scales, rtol=2e-3)
    assert (ours.codes == rounded.codes).double().mean().item() > 0.99


def test_desc_act_groups_follow_the_order_of_activations() -> None:
    diagonal = torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.1
    weight, grid = weights(16, 256), Grid(4, 64)
    ours = solve(weight, factorize(torch.diag(diagonal), 64, "desc_act"), grid)
    order = torch.argsort(diagonal, descending=True)
    assert torch.equal(ours.g_idx[order], torch.arange(256, dtype=torch.int32) // 64)
    assert not torch.equal(ours.g_idx, torch.arange(256, dtype=torch.int32) // 64)
    assert (dequantize(ours) - weight).norm() < 0.12 * weight.norm()


def test_groups_go_by_importance_and_stay_together() -> None:
    diagonal = torch.tensor([1.0, 3, 2, 9] * 16 + [5.0, 4] * 32)
    order = factorize(torch.diag(diagonal), 64).order
    assert sorted(order[:64].tolist()) == list(range(64, 128))
    assert order[:2].tolist() == [64, 66]
    assert order[64:66].tolist() == [3, 7]
    assert factorize(torch.diag(diagonal), 64, "none").order.tolist() == list(range(128))


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("sym", [True, False])
def test_dead_columns_are_zero_and_change_nothing_else(ordering: Ordering, sym: bool) -> None:
    hessian, weight, grid = correlated(128), weights(16, 128), Grid(4, 32, sym)
    dead = [3, 17, 64, 65, 127]
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[:, dead] = 100.0  # would ruin the scale of its group
    original = weight.clone()
    factor = factorize(hessian, 32, ordering)
    quantized = solve(weight, factor, grid)
    assert torch.equal(weight, original)
    assert quantized.dead == 5
    assert torch.equal(dequantize(quantized)[:, dead], torch.zeros(16, 5))
    alive = [column for column in range(128) if column not in dead]
    assert (dequantize(quantized) - weight)[:, alive].norm() < 0.2 * weight[:, alive].norm()


def test_all_columns_dead() -> None:
    quantized = solve(weights(8, 64), factorize(torch.zeros(64, 64), 32, damp=0), Grid(4, 32))
    assert quantized.dead == 64
    assert torch.equal(dequantize(quantized), torch.zeros(8, 64))


def test_a_failed_factorization_is_damped_more_and_reported() -> None:
    deficient = correlated(64, tokens=20)
    factor = factorize(deficient, 32, damp=0)
    assert factor.attempts == 2
    assert factor.damp_used == FIRST_RETRY_DAMP
    again = factorize(deficient, 32, damp=0.07)
    assert (again.attempts, again.damp_used) == (1, 0.07)
    weight, grid = weights(8, 64), Grid(4, 32)
    rounded = objective(weight, round_to_nearest(weight, grid), deficient)
    assert objective(weight, solve(weight, factor, grid), deficient) < 0.5 * rounded


def test_damping_doubles_until_it_is_enough() -> None:
    indefinite = correlated(64)
    indefinite -= 0.5 * indefinite.diagonal().mean() * torch.eye(64)
    indefinite.diagonal().clamp_(min=1e-3)
    factor = factorize(indefinite, 32, damp=0)
    assert factor.attempts > 3
    assert factor.damp_used == FIRST_RETRY_DAMP * 2 ** (factor.attempts - 2)


def test_a_matrix_that_no_damping_saves() -> None:
    hopeless = torch.full((32, 32), -1e6)
    hopeless.diagonal().fill_(1.0)
    with pytest.raises(FactorizationError, match="12 attempts"):
        factorize(hopeless, 32)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_the_factor_is_of_the_damped_hessian_in_order(ordering: Ordering) -> None:
    hessian = correlated(300)
    original = hessian.clone()
    factor = factorize(hessian, -1, ordering, damp=0.03)
    assert torch.equal(hessian, original)
    assert torch.equal(factor.upper, factor.upper.triu())
    product = factor.upper.double() @ factor.upper.double().T
    expected = damped(hessian, 0.03)[factor.order][:, factor.order]
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4 * expected.diagonal().mean().item())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("exponent", [-42, -12, -7, 3, 9, 18])
def test_zero_rows_and_extreme_values(sym: bool, exponent: int) -> None:
    weight = weights(8, 128)
    weight[2] = 0
    weight[5] *= 10.0**exponent
    ordinary = solve(weights(8, 128), factorize(correlated(128), 64), Grid(4, 64, sym))
    quantized = solve(weight, factorize(correlated(128), 64), Grid(4, 64, sym))
    values = dequantize(quantized)
    assert torch.equal(values[2], torch.zeros(128))
    assert bool(torch.isfinite(values).all())
    assert bool(((quantized.scales.abs() >= 2**-14) & (quantized.scales.abs() <= 65504)).all())
    for row in (0, 1, 3, 4, 6, 7):
        assert torch.equal(quantized.codes[row], ordinary.codes[row]), "a row does not disturb another"
    if exponent == 3:
        assert (values[5] - weight[5]).norm() < 0.2 * weight[5].norm()
    if exponent == -42:
        assert torch.equal(values[5], torch.zeros(128))


def test_stacked_matrices_are_those_of_each_alone() -> None:
    hessian, grid = correlated(256), Grid(4, 64)
    factor = factorize(hessian, 64)
    parts = [weights(24, 256, 1), weights(8, 256, 2), weights(40, 256, 3)]
    stacked, first = solve(torch.cat(parts), factor, grid), 0
    for part in parts:
        alone, mine = solve(part, factor, grid), stacked.rows(first, len(part))
        first += len(part)
        assert (alone.codes == mine.codes).double().mean().item() > 0.999
        assert mine.loss == pytest.approx(alone.loss, rel=1e-3)
        assert mine.scales.shape == (len(part), 4)


def test_the_same_bytes_whatever_the_number_of_threads() -> None:
    hessian, weight, grid = correlated(640), weights(96, 640), Grid(4, 128)
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(solve(weight, factorize(hessian, 128), grid))
    for other in found[1:]:
        assert torch.equal(found[0].codes, other.codes)
        assert torch.equal(found[0].scales, other.scales)
        assert torch.equal(found[0].row_losses, other.row_losses)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.008), (4, 0.12), (3, 0.25), (2, 0.6)])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_rounding_stays_near(bits: int, bound: float, sym: bool, group_size: int) -> None:
    weight = weights(16, 256)
    quantized = round_to_nearest(weight, Grid(bits, group_size, sym))
    error = dequantize(quantized) - weight
    assert error.norm() < bound * weight.norm()
    assert quantized.loss == pytest.approx(error.double().square().mean().item())
    assert quantized.codes.dtype == quantized.zeros.dtype == torch.uint8
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert quantized.g_idx.dtype == torch.int32


def test_refusals() -> None:
    hessian, weight, grid = correlated(64), weights(8, 64), Grid(4, 32)
    factor = factorize(hessian, 32)
    bad: Any
    for bad in (hessian[:, :-1], hessian[0]):
        with pytest.raises(SolverError, match="square"):
            factorize(bad, 32)
    bad = "static"
    with pytest.raises(SolverError, match="desc_act"):
        factorize(hessian, 32, bad)
    for damp in (-0.1, float("nan")):
        with pytest.raises(SolverError, match="damp"):
            factorize(hessian, 32, damp=damp)
    with pytest.raises(ValueError, match="multiple of the group size"):
        factorize(hessian, 128)
    with pytest.raises(NonFiniteTensorError, match="Hessian"):
        factorize(hessian.index_fill(0, torch.tensor([3]), float("nan")), 32)
    with pytest.raises(SolverError, match="64 columns"):
        solve(weights(8, 32), factor, grid)
    with pytest.raises(SolverError, match="32, for which"):
        solve(weight, factor, Grid(4, 64))
    with pytest.raises(SolverError, match="float32"):
        solve(weight.double(), factor, grid)
    with pytest.raises(NonFiniteTensorError, match="weight"):
        solve(weight.index_fill(1, torch.tensor([3]), float("inf")), factor, grid)
    with pytest.raises(NonFiniteTensorError, match="weight"):
        round_to_nearest(weight.index_fill(1, torch.tensor([3]), float("nan")), grid)
