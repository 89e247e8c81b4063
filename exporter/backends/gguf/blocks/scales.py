"""What scales and offsets ggml gives to groups of values, where that need not be searched for.

From `quantize_row_*` in ggml/src/ggml-quants.c of llama.cpp. Of Q8_0, and of Q4_0, Q4_1, Q5_0 and Q5_1 without an
importance matrix, they come from the largest and the smallest value (`quantize_row_q8_0_ref` and the like). With an
importance the search is for codes, and the scale of Q4_0 and Q5_0 is the weighted least squares of values over these
(`make_qx_quants`); Q4_1 and Q5_1 have the weighted line through them, the same through zero, or the line from the
smallest to the largest value (`make_qkx3_quants`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporter.backends.gguf.blocks.layouts import Coding

# How far what ggml computes of a few values may be off ours, as a share of the largest of them.
ROUNDED = 2.0**-22
# And of its sums over a group, which are of 32 terms in float32, one after the other.
_SUMMED = 8e-6
# Sums of weights below this have lost their bits: they say nothing.
_SMALLEST_SUM = 1e-30


@dataclass(frozen=True)
class Groups:
    """Groups of columns as they are stored: scale · code + offset.

    Attributes:
        coding: how their type writes them.
        values: float32 [groups, columns].
        scale: float32 [groups].
        offset: float32 [groups]; None if it is zero.
    """

    coding: Coding
    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None


@dataclass(frozen=True)
class Line:
    """Scales and offsets before they are rounded to float16, and by how much they may be off; all [groups]."""

    scale: torch.Tensor
    scale_noise: torch.Tensor
    offset: torch.Tensor | None = None
    offset_noise: torch.Tensor | None = None

    def is_of(self, groups: Groups) -> torch.Tensor:
        """Whether the stored ones are these, rounded: bool [groups]."""
        fits = rounds_to(groups.scale, self.scale, self.scale_noise)
        if groups.offset is not None and self.offset is not None and self.offset_noise is not None:
            fits &= rounds_to(groups.offset, self.offset, self.offset_noise)
        return fits


def rounds_to(stored: torch.Tensor, exact: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Whether float16 values are what exact ones, or such that are no farther off than the noise, round to."""
    low, high = (bound.to(torch.float16).float() for bound in (exact - noise, exact + noise))
    return (low <= stored) & (stored <= high)


def extreme_line(groups: Groups, values: torch.Tensor, noise: float) -> Line:
    """The line from the smallest to the largest value.

    Args:
        groups: groups as they are stored.
        values: float32 [groups, columns].
        noise: how far values may be off, as a share of the largest of their group.
    """
    high, low = values.amax(1), values.amin(1)
    lowest, highest = groups.coding.lowest, groups.coding.highest
    peak, noise = torch.maximum(high, -low), noise + ROUNDED
    if groups.offset is not None:
        return Line((high - low) / highest, 2 * noise / highest * peak, low, noise * peak)
    if lowest == -highest:
        return Line(peak / highest, noise / highest * peak)
    # The largest magnitude is the smallest code. Of two that differ in their signs alone, the first in the group is:
    # either will do.
    sign = torch.copysign(torch.ones_like(peak), groups.scale)
    side = torch.maximum(high * -sign, low * -sign)
    sign *= 2 * (side >= peak * (1 - 2 * noise)).float() - 1
    return Line(sign * peak / -lowest, noise / -lowest * peak)


def weights_of(merged: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """What an error counts: importance · sqrt(mean square of the row + value²), float32 [rows, columns].

    Args:
        merged: float32 [rows, columns].
        importance: float32 [columns] or [rows, columns].
    """
    squares = merged * merged
    squares.add_(squares.mean(1, keepdim=True)).sqrt_()
    # Only ratios matter: so that products of small numbers keep their bits.
    return squares.mul_(importance / importance.max().clamp_min(_SMALLEST_SUM))


def fitted_scale(groups: Groups, values: torch.Tensor, weights: torch.Tensor, noise: float) -> Line:
    """The scale that fits weighted values to the stored codes best.

    Args:
        groups: groups as they are stored.
        values: float32 [groups, columns].
        weights: what their errors count, likewise.
        noise: see `extreme_line`.
    """
    weighed = weights * groups.values
    products, squares = _sums(weighed, values), _sums(weighed, groups.values)
    scale = groups.scale * (products / squares)
    # Without codes, or weights, there is nothing to fit.
    known = (squares > _SMALLEST_SUM) & (groups.scale != 0)
    scale = torch.where(known, scale, groups.scale)
    return Line(scale, (_SUMMED + 2 * noise) * scale.abs())


def fitted_lines(groups: Groups, values: torch.Tensor, weights: torch.Tensor, noise: float) -> Sequence[Line]:
    """The lines that ggml chooses from: fitted, fitted through zero, and from the smallest to the largest value.

    Arguments as those of `fitted_scale`.
    """
    if groups.offset is None:
        raise ValueError("a line without an offset is a scale")
    unscaled = groups.scale == 0
    codes = groups.values - groups.offset[:, None]
    codes.div_(torch.where(unscaled, 1, groups.scale)[:, None]).round_()
    weighed = weights * codes
    # Weighted sums of ones, codes c and values x, and of their products.
    w, c, cc = weights.sum(1).double(), weighed.sum(1).double(), _sums(weighed, codes).double()
    x, cx = _sums(weights, values).double(), _sums(weighed, values).double()
    determinant = w * cc - c * c
    slope, start = (w * cx - x * c) / determinant, (cc * x - c * cx) / determinant
    low, high, highest = values.amin(1).clamp_max(0), values.amax(1), groups.coding.highest
    peak = torch.maximum(high, -low).double()
    # Where what is subtracted is nearly the same, bits are lost.
    summed = _SUMMED + 2 * noise
    lost = summed * w / determinant
    slope_noise, start_noise = lost * (c * peak + cc * slope.abs()), lost * cc * (peak + start.abs())
    unknown, none = ~(determinant > _SMALLEST_SUM) | unscaled, torch.zeros_like(slope)
    fitted = Line(
        torch.where(unknown, groups.scale, slope),
        torch.where(unknown, none, slope_noise),
        torch.where(unknown, groups.offset, start),
        torch.where(unknown, none, start_noise),
    )
    through_zero = Line(cx / cc, summed * (c * peak + cx.abs()) / cc, none, none)
    noise += ROUNDED
    ends = Line((high - low) / highest, 2 * noise / highest * peak, low, noise * peak)
    return fitted, through_zero, ends


def _sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Inner products of groups."""
    return torch.from_numpy(np.einsum("gk,gk->g", left.numpy(), right.numpy()))
