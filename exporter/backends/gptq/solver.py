"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): codes for a weight matrix that keep its outputs, not its weights.

Columns are quantized one after the other; what a column loses is made up for by those that are still to come. The paper
does that with the Cholesky factor of the inverse Hessian. Here the Hessian itself is factored, H = R R^T with R upper
triangular: the paper's factor is the inverse of R, its diagonal blocks are the inverses of R's diagonal blocks, and
between blocks the products of the residual with R say the same (theorem 6 of QuIP, arXiv:2307.13304). The results are
equal, and the inverse of a large matrix, most of the work of the paper's form, is never made.

Then the codes are swept again, each set to the best value given all others (coordinate descent, as QuantEase,
arXiv:2309.01885, does).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from exporter.backends.gptq.grid import Grid, nearest_steps, search_scales
from exporter.backends.gptq.options import DEFAULT_DAMP
from exporter.errors import ExporterError, NonFiniteTensorError, RefusalError

Ordering = Literal["none", "groups", "desc_act"]

# Columns of a block: within it every column is corrected at once, beyond it by one matrix product for the block. A
# multiple of every group size. From the paper.
BLOCK_COLUMNS = 128

# A factorization that fails is tried again with this much damping, then with twice as much, and so on.
FIRST_RETRY_DAMP = 0.01
MAX_ATTEMPTS = 12

# A pivot below this fraction of its diagonal is rounding error in float32.
SMALLEST_PIVOT = 4 * torch.finfo(torch.float32).eps

# One sweep lowers the error on other text by 3 %, two by 4 % (as above), at about as much time as the first pass each.
DEFAULT_SWEEPS = 1


class SolverError(RefusalError):
    """Arguments that do not fit each other."""


class FactorizationError(ExporterError):
    """A Hessian that is not positive definite, however much it is damped."""


@dataclass(frozen=True)
class Factor:
    """A factored Hessian, shared by all matrices that multiply the same input.

    Attributes:
        upper: R of H = R R^T, in the order of quantization: float32, upper triangular, shape (in, in).
        order: int64, shape (in,): which column is quantized first, second and so on.
        ordering: how the order was chosen.
        group_size: the group size for which it was chosen.
        dead: bool, shape (in,), in the columns' own order: inputs that were always zero.
        damp_used: the damping that succeeded, as a fraction of the mean diagonal.
        attempts: factorizations tried.
    """

    upper: torch.Tensor
    order: torch.Tensor
    ordering: Ordering
    group_size: int
    dead: torch.Tensor
    damp_used: float
    attempts: int


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        codes: uint8, shape (out, in), in the columns' own order.
        scales: float32 with values of `round_scales`, shape (out, groups).
        zeros: uint8, shape (out, groups).
        g_idx: int32, shape (in,): the group of each column.
        row_losses: float64, shape (out,): squared error, by `solve` weighted with the damped Hessian.
        dead: columns whose input was always zero.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    row_losses: torch.Tensor
    dead: int

    @property
    def loss(self) -> float:
        """Mean of the losses over all elements."""
        return self.row_losses.sum().item() / self.codes.numel()

    def rows(self, first: int, count: int) -> Quantized:
        """Some rows: one of the matrices that were stacked and solved together."""
        part = slice(first, first + count)
        return Quantized(
            self.codes[part], self.scales[part], self.zeros[part], self.g_idx, self.row_losses[part], self.dead
        )


def factorize(
    hessian: torch.Tensor, group_size: int, ordering: Ordering = "groups", damp: float = DEFAULT_DAMP
) -> Factor:
    """Order the columns and factor the damped Hessian.

    Args:
        hessian: float32, symmetric, shape (in, in), times any constant; not modified.
        group_size: columns that share a scale; -1 for all. Only `groups` looks at it.
        ordering: `groups` orders groups, and the columns within each, by the mean square of their input, largest first,
            and keeps groups together, so that g_idx stays sequential; `desc_act` orders all columns, so that groups are
            of columns that are not neighbours; `none` keeps the order.
        damp: added to the diagonal, as a fraction of its mean over columns that are not dead.

    Raises:
        SolverError: a Hessian that is not square, an unknown ordering, or a damping that is negative.
        GridError: the group size does not divide the columns.
        NonFiniteTensorError: the Hessian holds NaN or infinity.
        FactorizationError: all attempts failed.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise SolverError(
            "Hessian",
            found=f"shape {tuple(hessian.shape)}",
            expected="a square matrix",
            remedy="Give X^T X of the inputs.",
        )
    if not damp >= 0:
        raise SolverError("damp", found=str(damp), expected="zero or more", remedy="Use 0.01 to 0.2.")
    diagonal = hessian.diagonal()
    if not _is_finite(hessian):
        raise NonFiniteTensorError(
            "Hessian", found="NaN or infinity", expected="finite numbers", remedy="Look for overflow in activations."
        )
    dead = diagonal == 0
    order = quantization_order(diagonal, group_size, ordering)
    typical = diagonal[~dead].mean().item() if not bool(dead.all()) else 1.0
    used = damp
    for attempt in range(1, MAX_ATTEMPTS + 1):
        upper = _factor(hessian, order, dead, typical, used)
        if upper is not None:
            return Factor(upper, order, ordering, group_size, dead, used, attempt)
        last, used = used, max(FIRST_RETRY_DAMP, 2 * used)
    raise FactorizationError(
        "Hessian",
        found=f"no Cholesky factor in {MAX_ATTEMPTS} attempts, the last with damping {last:g}",
        expected="a positive definite matrix",
        remedy="Check that it is X^T X of real activations.",
    )


def quantization_order(diagonal: torch.Tensor, group_size: int, ordering: Ordering) -> torch.Tensor:
    """Which column comes first, second and so on: int64, shape (in,). See `factorize`.

    Args:
        diagonal: mean square of each input, shape (in,).
        group_size: columns of a group, or -1.
        ordering: see `factorize`.

    Raises:
        SolverError: an unknown ordering.
        GridError: the group size does not divide the columns.
    """
    if ordering == "none":
        return torch.arange(diagonal.shape[0], device=diagonal.device)
    if ordering == "desc_act":
        return torch.argsort(diagonal, descending=True, stable=True)
    if ordering != "groups":
        raise SolverError("ordering", found=ordering, expected="none, groups or desc_act", remedy="Choose one of them.")
    width = Grid(4, group_size).width(diagonal.shape[0])
    groups = diagonal.reshape(-1, width)
    order = torch.argsort(groups.mean(1), descending=True, stable=True)
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    return (order[:, None] * width + within[order]).reshape(-1)


def solve(weight: torch.Tensor, factor: Factor, grid: Grid, sweeps: int = DEFAULT_SWEEPS) -> Quantized:
    """Quantize a matrix, or several that multiply the same input, stacked by rows.

    Rows do not depend on each other: a stack gives each of its matrices the codes that it would get alone, but for
    rounding in the matrix products.

    Args:
        weight: float32, shape (out, in); not modified.
        factor: of the Hessian of its input, on the same device.
        grid: bits, group size and kind of zero point.
        sweeps: how often to go over the codes again.

    Raises:
        SolverError: shapes, group sizes or a number of sweeps that do not fit.
        GridError: the group size does not divide the columns.
        NonFiniteTensorError: the weight holds NaN or infinity.
    """
    width = grid.width(_check_weight(weight))
    if weight.shape[1] != factor.order.shape[0] or sweeps < 0:
        raise SolverError(
            "weight",
            found=f"{weight.shape[1]} columns, {sweeps} sweeps",
            expected=f"{factor.order.shape[0]} columns, no fewer than 0 sweeps",
            remedy="Use the factor of this layer's input.",
        )
    if factor.ordering == "groups" and factor.group_size != grid.group_size:
        raise SolverError(
            "group size",
            found=str(grid.group_size),
            expected=f"{factor.group_size}, for which the columns were ordered",
            remedy="Factor the Hessian again.",
        )
    state = _State.start(weight, factor, grid, width)
    for first, last in _blocks(len(factor.order)):
        _quantize_block(state, first, last)
    for _ in range(sweeps):
        for first, last in _blocks(len(factor.order)):
            _sweep_block(state, first, last)
    return state.finish(factor)


def round_to_nearest(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Quantized:
    """Quantize without a Hessian, for what calibration did not reach.

    Args:
        weight: float32, shape (out, in).
        grid: bits, group size and kind of zero point.
        importance: float32, shape (in,): weight of each column's squared error in the search for scales.

    Raises:
        SolverError, GridError, NonFiniteTensorError: as `solve`.
    """
    columns = _check_weight(weight)
    width = grid.width(columns)
    found = [
        search_scales(
            weight[:, first : first + width].T.contiguous(),
            grid,
            None if importance is None else importance[first : first + width],
        )
        for first in range(0, columns, width)
    ]
    scales = torch.stack([scale for scale, _ in found], dim=1)
    zeros = torch.stack([zero for _, zero in found], dim=1)
    g_idx = torch.arange(columns, device=weight.device) // width
    steps = nearest_steps(weight, scales[:, g_idx], zeros[:, g_idx], grid)
    error = weight - scales[:, g_idx] * steps
    return Quantized(
        (steps + zeros[:, g_idx]).to(torch.uint8),
        scales,
        zeros.to(torch.uint8),
        g_idx.to(torch.int32),
        error.double().square_().sum(1),
        dead=0,
    )


def dequantize(quantized: Quantized) -> torch.Tensor:
    """What the server computes with: float32, shape (out, in), `scale * (code - zero)`."""
    g_idx = quantized.g_idx.to(torch.int64)
    steps = quantized.codes.to(torch.float32) - quantized.zeros.to(torch.float32)[:, g_idx]
    return steps.mul_(quantized.scales[:, g_idx])


@dataclass(frozen=True)
class _State:
    """The tensors that a solution fills in, transposed and in the order of quantization.

    A column of the weight is then a contiguous row, and `errors`, R^T times the residual, has the loss as its square.
    """

    grid: Grid
    width: int
    upper: torch.Tensor
    residual: torch.Tensor  # the weight, and where a column has its codes, what they miss of it; (in, out)
    errors: torch.Tensor  # (in, out)
    codes: torch.Tensor  # less the zero point, (in, out)
    scales: torch.Tensor  # (groups, out)
    zeros: torch.Tensor  # (groups, out)

    @classmethod
    def start(cls, weight: torch.Tensor, factor: Factor, grid: Grid, width: int) -> _State:
        columns = weight.T[factor.order]
        columns[factor.dead[factor.order]] = 0
        groups = columns.new_empty(columns.shape[0] // width, columns.shape[1])
        return cls(
            grid,
            width,
            factor.upper,
            residual=columns,
            errors=torch.empty_like(columns),
            codes=torch.empty_like(columns, dtype=torch.int16),
            scales=groups,
            zeros=torch.empty_like(groups),
        )

    def scales_of(self, first: int, last: int) -> torch.Tensor:
        """Scales of columns `first` to `last`: float32, shape (last - first, out)."""
        return self.scales[torch.arange(first, last, device=self.scales.device) // self.width]

    def finish(self, factor: Factor) -> Quantized:
        """Undo the order of quantization."""
        place = torch.arange(len(factor.order), device=factor.order.device) // self.width
        # A group of neighbours goes by its own number; with desc_act groups are numbered as they come.
        group = place if factor.ordering == "desc_act" else factor.order // self.width
        g_idx = torch.empty_like(group, dtype=torch.int32)
        g_idx[factor.order] = group.to(torch.int32)
        codes = torch.empty_like(self.codes, dtype=torch.uint8)
        codes[factor.order] = (self.codes + self.zeros.to(torch.int16)[place]).to(torch.uint8)
        scales, zeros = torch.empty_like(self.scales), torch.empty_like(self.zeros, dtype=torch.uint8)
        numbers = group[:: self.width]
        scales[numbers], zeros[numbers] = self.scales, self.zeros.to(torch.uint8)
        losses = torch.zeros(self.errors.shape[1], dtype=torch.float64, device=self.errors.device)
        for part in torch.split(self.errors, BLOCK_COLUMNS):
            losses += part.double().square_().sum(0)
        return Quantized(
            codes.T.contiguous(),
            scales.T.contiguous(),
            zeros.T.contiguous(),
            g_idx,
            losses,
            int(factor.dead.sum()),
        )


def _quantize_block(state: _State, first: int, last: int) -> None:
    """Quantize columns `first` to `last`, each making up for the ones before it; search scales where a group starts."""
    triangle = state.upper[first:last, first:last]
    inverse = torch.linalg.inv(triangle.double()).float().triu_()
    columns = state.residual[first:last].clone()
    if first:
        columns.addmm_(inverse.T, state.upper[:first, first:last].T @ state.residual[:first])
    # What a unit of error in a column costs once all later columns have made up for it.
    importance = state.upper.diagonal().square()
    if first == 0 and state.width > BLOCK_COLUMNS:
        state.scales[0], state.zeros[0] = search_scales(state.residual, state.grid, importance)
    costs, steps = triangle.diagonal().tolist(), torch.empty_like(columns)
    for index, cost in enumerate(costs):
        group, offset = divmod(first + index, state.width)
        if offset == 0 and state.width <= BLOCK_COLUMNS:
            members = columns[index : index + state.width]
            part = importance[first + index : first + index + state.width]
            state.scales[group], state.zeros[group] = search_scales(members, state.grid, part)
        scale = state.scales[group]
        step = nearest_steps(columns[index], scale, state.zeros[group], state.grid, out=steps[index])
        error = torch.addcmul(columns[index], step, scale, value=-1, out=state.errors[first + index]).mul_(cost)
        columns[index + 1 :].addr_(inverse[index, index + 1 :], error, alpha=-1)
    state.codes[first:last] = steps
    state.residual[first:last] -= steps.mul_(state.scales_of(first, last))


def _sweep_block(state: _State, first: int, last: int) -> None:
    """Set each code of columns `first` to `last` to the best one, given all others."""
    rows = state.upper[first:last, first:]
    hessian = rows @ rows.T
    gradient = rows @ state.errors[first:]
    old = state.codes[first:last].to(torch.float32)
    new, values = torch.empty_like(old), old * state.scales_of(first, last)
    for index, curvature in enumerate(hessian.diagonal().tolist()):
        group = (first + index) // state.width
        scale = state.scales[group]
        best = torch.add(values[index], gradient[index], alpha=1 / curvature)
        step = nearest_steps(best, scale, state.zeros[group], state.grid, out=new[index])
        change = torch.addcmul(values[index], step, scale, value=-1, out=values[index])
        gradient[index + 1 :].addr_(hessian[index + 1 :, index], change)
    state.codes[first:last] = new
    state.errors[first:].addmm_(rows.T, values)


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    for first in range(0, columns, BLOCK_COLUMNS):
        yield first, min(first + BLOCK_COLUMNS, columns)


def _factor(
    hessian: torch.Tensor, order: torch.Tensor, dead: torch.Tensor, typical: float, damp: float
) -> torch.Tensor | None:
    """R of H = R R^T with the columns in order; None where H is not positive definite as far as float32 can tell."""
    upper = torch.empty_like(hessian, dtype=torch.float32, memory_format=torch.contiguous_format)
    for first, last in _blocks(len(order)):
        upper[first:last] = hessian[order[first:last]][:, order]
    diagonal = upper.diagonal()
    # A dead column has zeros beside the diagonal: any positive number on it will do.
    diagonal[dead[order]] = typical
    diagonal += damp * typical
    bounds = diagonal * SMALLEST_PIVOT
    return upper if _cholesky(upper) and bool((diagonal.square() > bounds).all()) else None


def _cholesky(matrix: torch.Tensor) -> bool:
    """Replace a symmetric matrix A by the upper triangular R of A = R R^T; false where A is not positive definite.

    By blocks from the last to the first. LAPACK's own divides the work among threads so that the last bits depend on
    their number; products, and factors of one small block, do not (torch 2.13 with MKL, measured for 1 and 2 threads).
    """
    for first, last in reversed(list(_blocks(matrix.shape[0]))):
        panel = matrix[:last, first:last]
        panel.addmm_(matrix[:last, last:], matrix[first:last, last:].T, alpha=-1)
        # The lower factor of the reversed block, reversed again, is its upper factor.
        factor, info = torch.linalg.cholesky_ex(panel[first:].flip((0, 1)))
        if info.item() != 0:
            return False
        panel[first:] = factor.flip((0, 1))
        panel[:first] = torch.linalg.solve_triangular(panel[first:].T, panel[:first], upper=False, left=False)
    matrix.triu_()
    return True


def _check_weight(weight: torch.Tensor) -> int:
    """Columns of the weight."""
    if weight.ndim != 2 or weight.dtype != torch.float32 or weight.shape[0] == 0:
        raise SolverError(
            "weight",
            found=f"{weight.dtype} of shape {tuple(weight.shape)}",
            expected="float32 of shape (out, in)",
            remedy="Give the float32 merge.",
        )
    if weight.shape[1] and not _is_finite(weight):
        raise NonFiniteTensorError(
            "weight", found="NaN or infinity", expected="finite numbers", remedy="Check the base and the adapter."
        )
    return weight.shape[1]


def _is_finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
