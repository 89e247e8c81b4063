"""The grid of a group: which values a group of weights can take, and the scale and zero point that suit it best.

A weight is stored as a code of a few bits and read by the server as `scale * (code - zero)`. The scale is stored in
float16; vLLM reads it into the model's dtype, mostly bfloat16. So scales are rounded to numbers that both hold exactly
before anything is measured with them, here and in the solver: codes are chosen for what every server multiplies with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporter.backends.gptq.names import BITS, GROUP_SIZES
from exporter.errors import RefusalError

# Normal float16 numbers that bfloat16 has as well: kernels that flush subnormal ones to zero would lose the group.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65280.0

# Factors by which the range of a group is stretched or shrunk. Measured on three layers of a 0.5B: 12 to 40 factors,
# and lower bounds from 0.25 to 0.7, differ by less than 1 % of the error; at 8 bits shrinking never pays.
SHRINK_FACTORS = 16
SMALLEST_FACTOR = {2: 0.2, 3: 0.35, 4: 0.5, 8: 0.94}
LARGEST_FACTOR = {2: 1.1, 3: 1.1, 4: 1.1, 8: 1.02}
# Bits at which scales of both signs are searched; at others the sign is such that the longer side of the codes points
# to the largest weight. On random weights with a skewed Hessian trying both leaves 4.4 % less error at 2 bits, 1.2 % at
# 3 and 0.3 % at 4, where it is not worth its time.
BOTH_SIGNS = (2, 3)

# Elements of one chunk of the search: on the CPU its few buffers stay in the cache, on CUDA it fills the chip.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}

# A group whose step would be smaller counts as zero: dividing by it could overflow.
SMALLEST_STEP = 1e-30


class GridError(RefusalError):
    """A grid that does not exist, or that does not fit the matrix."""


def check_bits(bits: int) -> None:
    """Refuse a number of bits that no checkpoint has.

    Raises:
        GridError: it is none of `BITS`.
    """
    if bits not in BITS:
        raise GridError("bits", found=str(bits), expected="2, 3, 4 or 8", remedy="Choose one of them.")


@dataclass(frozen=True)
class Grid:
    """How codes stand for weights.

    Attributes:
        bits: bits of a code, one of 2, 3, 4, 8.
        group_size: input columns that share a scale, one of 32, 64, 128; -1 for all columns.
        sym: the zero point is fixed in the middle of the codes; otherwise it is searched for.
        signed_scales: only for sym, where the codes reach one step further down than up. A negative scale turns that
            side towards where it is wanted more. Servers multiply by whatever the scale is.

    Raises:
        GridError: another number of bits or another group size.
    """

    bits: int
    group_size: int
    sym: bool = True
    signed_scales: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size not in GROUP_SIZES:
            raise GridError(
                "group size", found=str(self.group_size), expected="-1, 32, 64 or 128", remedy="Choose one of them."
            )

    @property
    def max_code(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def width(self, in_features: int) -> int:
        """Columns of a group in a matrix of `in_features` columns.

        Raises:
            GridError: the last group would be ragged, or there are no columns.
        """
        width = in_features if self.group_size == -1 else self.group_size
        if in_features < 1 or in_features % width:
            raise GridError(
                "input features",
                found=str(in_features),
                expected=f"a multiple of the group size {self.group_size}" if in_features > 0 else "at least one",
                remedy="Choose a group size that divides it, or -1.",
            )
        return width

    def groups(self, in_features: int) -> int:
        """Groups of a matrix of `in_features` columns.

        Raises:
            GridError: see `width`.
        """
        return in_features // self.width(in_features)


def search_scales(
    columns: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of one group, for each row, with the least weighted squared error.

    Starts from the range of the group, shrinks it step by step, and for the codes that each step gives takes the scale
    that fits them best by least squares, as make_qx_quants of llama.cpp's ggml-quants.c does.

    Args:
        columns: float32, finite, shape (width, rows): the weights of the group, transposed.
        grid: the grid; its group size is not looked at.
        importance: float32, not negative, shape (width,): weight of each column's squared error; None for equal ones.

    Returns:
        Scales and zero points, float32, shape (rows,). A scale is never zero, see `round_scales`. A searched zero
        point is at least 1: checkpoints store it less one, and readers disagree about what wraps.
    """
    scales = torch.empty(columns.shape[1], dtype=torch.float32, device=columns.device)
    zeros = torch.full_like(scales, grid.middle)
    weights = torch.ones(columns.shape[0], device=columns.device) if importance is None else importance
    weights = weights / weights.max().clamp_min(torch.finfo(torch.float32).tiny)
    count = max(64, CHUNK_ELEMENTS[columns.device.type] // columns.shape[0])
    for first in range(0, columns.shape[1], count):
        part = slice(first, first + count)
        if grid.sym:
            scales[part] = _search_symmetric(columns[:, part], grid, weights)
        else:
            scales[part], zeros[part] = _search_asymmetric(columns[:, part], grid, weights)
    return scales, zeros


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as every server will have them: normal float16 numbers that bfloat16 holds too, never zero, in float32."""
    size = scales.abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).to(torch.float32)
    return torch.copysign(size, scales)


def nearest_steps(
    weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes of the nearest values, less their zero point: float32.

    Args:
        weights: float32.
        scales: broadcasts to the weights.
        zeros: float32, broadcasts to the weights.
        grid: the grid.
        out: where the result goes; None to allocate it.
    """
    return torch.div(weights, scales, out=out).round_().clamp_(-zeros, grid.max_code - zeros)


def _search_symmetric(columns: torch.Tensor, grid: Grid, weights: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(columns, dim=0)
    step = torch.maximum(-low, high) / grid.middle
    if grid.signed_scales:
        step = torch.where(high > -low, -step, step)
    units, step = _in_steps(columns, step)
    best = _Best(units, weights)
    codes = torch.empty_like(units)
    for factor in _factors(grid):
        torch.mul(units, 1 / factor, out=codes)
        best.offer(codes.round_().clamp_(-grid.middle, grid.middle - 1))
        if grid.signed_scales and grid.bits in BOTH_SIGNS:
            torch.mul(units, -1 / factor, out=codes)
            best.offer(codes.round_().clamp_(-grid.middle, grid.middle - 1))
    return round_scales(best.scale * step)


def _search_asymmetric(columns: torch.Tensor, grid: Grid, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = torch.aminmax(columns, dim=0)
    low.clamp_(max=0)
    units, step = _in_steps(columns, (high.clamp(min=0) - low) / grid.max_code)
    # The range shrinks at both ends, so the zero point stays where it is.
    zero = (-low / step).round_().clamp_(1, grid.max_code)
    best = _Best(units, weights)
    codes = torch.empty_like(units)
    for factor in _factors(grid):
        torch.mul(units, 1 / factor, out=codes)
        best.offer(codes.round_().clamp_(-zero, grid.max_code - zero))
    return round_scales(best.scale * step), zero


def _in_steps(columns: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The group in units of its step, so that no weight is too large or too small for what follows; and the step."""
    empty = step.abs() < SMALLEST_STEP
    step = torch.where(empty, 1.0, step)
    # Squared codes of an empty group are zero, so its scale stays at the factor: make that as small as may be.
    return columns / step * ~empty, torch.where(empty, SMALLEST_SCALE, step)


def _factors(grid: Grid) -> list[float]:
    low, high = SMALLEST_FACTOR[grid.bits], LARGEST_FACTOR[grid.bits]
    return [low + (high - low) * index / (SHRINK_FACTORS - 1) for index in range(SHRINK_FACTORS)]


class _Best:
    """The best scale so far of each row, over codes that are offered one set after the other.

    With w the importance, x the weights and q the codes less the zero point, the best scale is A / B and its error
    sum(w x x) - A * A / B, where A = sum(w x q) and B = sum(w q q).
    """

    def __init__(self, units: torch.Tensor, weights: torch.Tensor) -> None:
        self.scale = torch.ones(units.shape[1], device=units.device)
        self._gain = torch.zeros_like(self.scale)
        self._weights = weights
        self._weighted = units * weights[:, None]
        self._product = torch.empty_like(units)

    def offer(self, codes: torch.Tensor) -> None:
        """Take the codes where they are better."""
        a = torch.mul(self._weighted, codes, out=self._product).sum(0)
        b = self._weights @ torch.mul(codes, codes, out=self._product)
        scale = a / b
        gain = a * scale
        # Where all codes are zero, and so is b, the comparison with NaN is false.
        better = gain > self._gain
        self.scale = torch.where(better, scale, self.scale)
        self._gain = torch.where(better, gain, self._gain)
