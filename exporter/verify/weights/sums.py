"""What is in the stored weights: relative errors, and how much of the adapter's change is still there.

With base W, merge W' = W + D and stored values S, of each tensor (Frobenius norms and inner products):

    relative error     |S - W'| / |W'|
    delta survival     <S - W, D> / |D|^2 = 1 + <E, D> / |D|^2 with the error E = S - W'
    error of the delta |(S - W) - D| / |D| = |E| / |D|

Survival is 1 where all of the adapter's change is stored, 0 where it was left out, 2 where it was applied twice. An
error that has nothing to do with D, of the same variance |E|^2 / n in each of n elements, gives <E, D> the variance
|E|^2 |D|^2 / n, so the standard error of survival is |E| / (sqrt(n) |D|). Of several tensors together, inner products
and variances add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import numpy.typing as npt

from exporter.backends.weight_reader import StoredWeight
from exporter.reference.pack.sketch import different_values

# Standard errors within which survival must be 1; of hundreds of tensors, not one is as far off by chance.
SURVIVAL_ERRORS = 6.0
# What survival may be off beside: merges that differ in the last bits of a float32.
SURVIVAL_SLACK = 0.01
# And where the base lies on a grid of its own: sound GPTQ of a real 0.5B in groups of 128 is off by up to 0.11 in a
# tensor at 8 bits, 0.18 at 4 and 0.41 at 3; without the adapter by 0.81 at least (4 bits).
GRID_SLACK = 0.5
# Squared, the share of its block's largest group that every group is taken to have at least: scales are stored as
# multiples of their block's, and a group of almost nothing takes what the block leaves it.
BLOCK_SHARE = 1 / 16
VARIED = 0.94
# The least cosine between error and merge of a group whose scale is off, and not its largest values cut: of a scale
# that lost a third, 0.96 at 4 bits. Of the sound groups of a real 0.5B that lost more than a fifth, 234 at 4 bits had
# at most 0.83, and 9,007 at 3 bits at most 0.862 (scripts/measurements/weight_figures.py).
PARALLEL = 0.88
# Added to squared norms, so that a group of zeros is infinitely far off or not at all.
_TINY = 1e-60
_TINY_ELEMENT = 1e-30

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Worst:
    """The group that is farthest off.

    Attributes:
        value: how far.
        row: its row.
        column: its first column.
    """

    value: float = 0.0
    row: int = 0
    column: int = 0


@dataclass(frozen=True)
class Sums:
    """Sums over the elements of a tensor, of some of its rows, or of several tensors, in float64.

    Attributes:
        elements: how many.
        error: |E|^2.
        merged: |W'|^2.
        delta: |D|^2.
        error_delta: <E, D>.
        base_delta: <W, D>; of several tensors, the sum of its magnitudes.
        variance: of `error_delta`, by the error alone: |E|^2 |D|^2 / n of each tensor.
        group: the group with the largest relative error.
        gain: the group whose scale is farthest off: |<E, W'>| / |W'|^2.
        shift: the row whose mean error is farthest from zero: |mean(E)| over the root mean square of W', by row. Of
            groups, as the two before it.
        different: different values of the base in runs of columns, of so many `looked_at`; where there is a delta.
        looked_at: see `different`.
    """

    elements: int = 0
    error: float = 0.0
    merged: float = 0.0
    delta: float = 0.0
    error_delta: float = 0.0
    base_delta: float = 0.0
    variance: float = 0.0
    group: Worst = Worst()
    gain: Worst = Worst()
    shift: Worst = Worst()
    different: int = 0
    looked_at: int = 0

    def plus(self, other: Sums) -> Sums:
        """Both together; of groups that are equally far off, or not finite, the first stays."""
        return Sums(
            self.elements + other.elements,
            self.error + other.error,
            self.merged + other.merged,
            self.delta + other.delta,
            self.error_delta + other.error_delta,
            self.base_delta + other.base_delta,
            self.variance + other.variance,
            max(self.group, other.group, key=_far),
            max(self.gain, other.gain, key=_far),
            max(self.shift, other.shift, key=_far),
            self.different + other.different,
            self.looked_at + other.looked_at,
        )

    def whole(self) -> Sums:
        """Of a whole tensor, whose rows were added up: with its variance."""
        variance = self.error * self.delta / self.elements if self.elements else 0.0
        return replace(self, base_delta=abs(self.base_delta), variance=variance)

    @property
    def varied(self) -> bool:
        """Whether the base's values are as varied as those of 16 bits."""
        return self.different > VARIED * self.looked_at

    @property
    def relative_error(self) -> float:
        """|E| / |W'|; infinite if the merge is zero and what is stored is not."""
        if self.merged == 0:
            return math.inf if self.error else 0.0
        return math.sqrt(self.error / self.merged)

    @property
    def survival(self) -> float | None:
        """1 + <E, D> / |D|^2; None without a delta."""
        return 1 + self.error_delta / self.delta if self.delta else None

    @property
    def survival_stderr(self) -> float | None:
        """Standard error of survival; None without a delta."""
        return math.sqrt(self.variance) / self.delta if self.delta else None

    @property
    def delta_error(self) -> float | None:
        """|E| / |D|; None without a delta."""
        return math.sqrt(self.error / self.delta) if self.delta else None

    @property
    def survival_limit(self) -> float:
        """How far survival may be from 1; infinite without a delta.

        Beside the noise: a quantizer that minimizes its error shrinks what it stores, W' to about (1 - r^2) W' with
        the relative error r, and survival falls by r^2 (1 + <W, D> / |D|^2).
        """
        if not self.delta:
            return math.inf
        shrunk = min(1.0, self.relative_error**2) * (1 + self.base_delta / self.delta)
        slack = SURVIVAL_SLACK + (0.0 if self.varied else GRID_SLACK)
        return slack + SURVIVAL_ERRORS * math.sqrt(self.variance) / self.delta + 2 * shrunk


def _far(worst: Worst) -> float:
    """How far, for an order: what is no number is farther than anything."""
    return math.inf if math.isnan(worst.value) else worst.value


def total(parts: Iterable[Sums]) -> Sums:
    """All together."""
    return reduce(Sums.plus, parts, Sums())


def block_sums(stored: Floats, merged: Floats, base: Floats | None, weight: StoredWeight, first: int = 0) -> Sums:
    """Sums of some rows.

    Args:
        stored: float32, shape (rows, columns).
        merged: likewise.
        base: likewise, where the tensor has a delta; None where it has none.
        weight: its groups and tolerance.
        first: number of the first row.
    """
    error = stored - merged
    if weight.group == 1:
        sums = _element_sums(error, merged, weight, first)
    else:
        sums = _group_sums(error, merged, weight, first)
    if base is None:
        return sums
    delta = merged - base
    squared, error_delta, base_delta = _product(delta, delta), _product(error, delta), _product(base, delta)
    different, looked_at = different_values(base)
    return replace(
        sums, delta=squared, error_delta=error_delta, base_delta=base_delta, different=different, looked_at=looked_at
    )


def _element_sums(error: Floats, merged: Floats, weight: StoredWeight, first: int) -> Sums:
    """Of values that were rounded one by one: the worst group is the worst element."""
    ratio = np.maximum(np.abs(error) - np.float32(weight.tolerance.resolution), 0)
    ratio /= np.abs(merged) + np.float32(_TINY_ELEMENT)
    worst = _worst(ratio, weight, first)
    return Sums(error.size, _product(error, error), _product(merged, merged), group=worst)


def _group_sums(error: Floats, merged: Floats, weight: StoredWeight, first: int) -> Sums:
    errors, norms = _by_group(error, error, weight), _by_group(merged, merged, weight)
    along = _along(errors, norms, _by_group(error, merged, weight), weight)
    # The least norm that a group is taken to have, and what its error may be in any case.
    floored = norms + BLOCK_SHARE * norms.max(axis=2, keepdims=True) + _TINY
    resolution = weight.group * weight.tolerance.resolution**2
    return Sums(
        error.size,
        float(errors.sum()),
        float(norms.sum()),
        group=_worst(np.sqrt(np.maximum(errors - resolution, 0) / floored), weight, first),
        gain=_worst(np.maximum(along - np.sqrt(resolution * norms), 0) / floored, weight, first),
        shift=_shifted(error, norms, weight, first),
    )


def _along(errors: Doubles, norms: Doubles, products: Doubles, weight: StoredWeight) -> Doubles:
    """|<E, W'>| of groups, shape (rows, blocks, groups in a block): what a wrong scale shows in.

    A group of a clipped type whose largest values were cut is smaller too, but its error is then only in those, and
    does not go along with the others.
    """
    along: Doubles = np.abs(products)
    if not weight.tolerance.clipped:
        return along
    parallel = products**2 >= PARALLEL**2 * errors * norms
    return np.where((products < 0) & ~parallel, along / 2, along)


def _shifted(error: Floats, norms: Doubles, weight: StoredWeight, first: int) -> Worst:
    means = np.maximum(np.abs(error.mean(axis=1)) - weight.tolerance.resolution, 0)
    shifts = means / (np.sqrt(norms.sum(axis=(1, 2)) / error.shape[1]) + _TINY_ELEMENT)
    row = int(shifts.argmax())
    return Worst(float(shifts[row]), first + row)


def _product(left: Floats, right: Floats) -> float:
    """Inner product: float32 within a row, float64 from there on."""
    return float(np.einsum("rk,rk->r", left, right).sum(dtype=np.float64))


def _by_group(left: Floats, right: Floats, weight: StoredWeight) -> Doubles:
    """Inner products, shape (rows, blocks, groups in a block): float32 within a group, float64 from there on."""
    rows, columns = left.shape
    products: Floats = np.einsum("gk,gk->g", left.reshape(-1, weight.group), right.reshape(-1, weight.group))
    blocks: Doubles = products.astype(np.float64).reshape(rows, columns // weight.block, weight.block // weight.group)
    return blocks


def _worst(values: Doubles | Floats, weight: StoredWeight, first: int) -> Worst:
    # argmax takes the first NaN for the largest.
    row, column = divmod(int(values.argmax()), values[0].size)
    return Worst(float(values[row].flat[column]), first + row, column * weight.group)
