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

from dataclasses import dataclass

import torch

from exporter.backends.gptq.solver.factor import BLOCK_COLUMNS, Factor, SolverError, blocks, is_finite
from exporter.backends.gptq.solver.grid import Grid, nearest_steps, search_scales
from exporter.errors import NonFiniteTensorError

# One sweep lowers the error on other text by 3 %, two by 4 % (as above), at about as much time as the first pass each.
DEFAULT_SWEEPS = 1


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
    for first, last in blocks(len(factor.order)):
        _quantize_block(state, first, last)
    for _ in range(sweeps):
        for first, last in blocks(len(factor.order)):
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


def _check_weight(weight: torch.Tensor) -> int:
    """Columns of the weight."""
    if weight.ndim != 2 or weight.dtype != torch.float32 or weight.shape[0] == 0:
        raise SolverError(
            "weight",
            found=f"{weight.dtype} of shape {tuple(weight.shape)}",
            expected="float32 of shape (out, in)",
            remedy="Give the float32 merge.",
        )
    if weight.shape[1] and not is_finite(weight):
        raise NonFiniteTensorError(
            "weight", found="NaN or infinity", expected="finite numbers", remedy="Check the base and the adapter."
        )
    return weight.shape[1]
