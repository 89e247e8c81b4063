"""The factored Hessian that all matrices of the same input are solved with: its damping, and the order of its columns.

The Hessian itself is factored, H = R R^T with R upper triangular: `exporter.backends.gptq.solver` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from exporter.backends.gptq.options import DEFAULT_DAMP
from exporter.backends.gptq.solver.grid import Grid
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
    if not is_finite(hessian):
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


def blocks(columns: int) -> Iterator[tuple[int, int]]:
    """First column of each block, and the first one after it."""
    for first in range(0, columns, BLOCK_COLUMNS):
        yield first, min(first + BLOCK_COLUMNS, columns)


def _factor(
    hessian: torch.Tensor, order: torch.Tensor, dead: torch.Tensor, typical: float, damp: float
) -> torch.Tensor | None:
    """R of H = R R^T with the columns in order; None where H is not positive definite as far as float32 can tell."""
    upper = torch.empty_like(hessian, dtype=torch.float32, memory_format=torch.contiguous_format)
    for first, last in blocks(len(order)):
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
    for first, last in reversed(list(blocks(matrix.shape[0]))):
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


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
