"""The limits that each stored weight is held to, by its type.

A tensor must keep its type's limits as a whole, and in every group of columns that share a scale: damage to one scale
or a few rows is lost in the sum over a large tensor. A wrong zero point moves the mean of a row. What the limits cannot
see is a change that is smaller than what rounding leaves anyway, such as a low mantissa bit of a scale; readers that
know what their quantizer makes of the merge do (`exporter.backends.weight_reader.WeightReader.impossible_groups`).

Survival of the adapter's change D (see `exporter.verify.weights.sums`) is judged where that says something. The error
has to do with D where the base itself lies on a grid: each element then goes back to where it was, or over the edge
that it was on, as D decides. A delta may vanish that way, or grow. Every base of bfloat16 is such a grid to bfloat16,
and one that was dequantized is to other types. So survival is judged where groups of columns share a scale and the
base's values are
as varied as those of 16 bits; where every element is rounded by itself, each has a limit that no wrong delta keeps. A
group of many columns spans several groups of any grid that the base may be on, whose edges then lie anywhere in its own
steps: there survival is judged too, by a limit that tells a delta that is left out or doubled, and no more. Survival is
reported in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.backends.weight_reader import StoredWeight
from exporter.verify.weights.sums import Sums, Worst

# Of a tensor's relative error, how far the mean of a row may move. Rounding moves it by its error over the root of the
# columns; a zero point that is one off by a whole step, the root of 12 times the error.
SHIFT_SHARE = 0.5
# Columns of a group that spans several of those that a dequantized base was on: of 16 or 32 in GGUF's types.
SPANNING_COLUMNS = 128


@dataclass(frozen=True)
class LimitCheck:
    """A figure of a stored weight beside its limit.

    Attributes:
        measure: `relative_error`, `group`, `scale`, `row_mean` or `survival`.
        value: the figure; of survival, how far it is from 1.
        limit: the largest that it may be.
        row: where that is, if it is of a part; else None.
        column: first column of the part; None if it is of a whole row.
        reason: what to say if the limit is broken.
    """

    measure: str
    value: float
    limit: float
    reason: str
    row: int | None = None
    column: int | None = None

    @property
    def kept(self) -> bool:
        """Whether the limit is; NaN breaks it."""
        return self.value <= self.limit

    @property
    def share(self) -> float:
        """Of the limit, how much was taken; infinite if it cannot be said."""
        if self.value == 0 or math.isinf(self.limit):
            return 0.0
        share = self.value / self.limit if self.limit else math.inf
        return math.inf if math.isnan(share) else share


def figure_checks(weight: StoredWeight, sums: Sums) -> Iterator[LimitCheck]:
    """Everything that a stored weight is held to."""
    limits, name = weight.tolerance, weight.source
    error = sums.relative_error
    group = sums.group
    # Only the farthest part is known: others of the weight may be off too.
    farthest = f", {_place(group, weight)} the most" if group.value else ""
    reason = f"{name} is {error:.2%} off{farthest}; {weight.type} leaves at most {limits.error:.2%}"
    yield LimitCheck("relative_error", error, limits.error, reason)
    verb = "are" if weight.group > 1 else "is"
    reason = f"{name}: {_place(group, weight)} {verb} {group.value:.2%} off, the limit is {limits.group:.2%}"
    yield LimitCheck("group", group.value, limits.group, reason, group.row, group.column)
    if weight.group > 1:
        scale = sums.gain
        reason = (
            f"{name}: the scale of {_place(scale, weight)} is {scale.value:.2%} off, the limit is {limits.gain:.2%}"
        )
        yield LimitCheck("scale", scale.value, limits.gain, reason, scale.row, scale.column)
        shift, limit = sums.shift, SHIFT_SHARE * limits.error
        reason = f"{name}: row {shift.row} is shifted by {shift.value:.2%} of its size, the limit is {limit:.2%}"
        yield LimitCheck("row_mean", shift.value, limit, reason, shift.row)
    if is_judged(weight, sums):
        yield survival_check(sums, f"{name}: of the adapter's change")


def survival_check(sums: Sums, of_what: str) -> LimitCheck:
    """Survival of a weight, or of several together, that have a delta; `of_what` begins its reason."""
    survival, limit = sums.survival, sums.survival_limit
    if survival is None:
        raise ValueError("without a delta there is no survival")
    reason = f"{of_what} {survival:z.0%} (limit 100% ± {limit:.0%}) is stored"
    return LimitCheck("survival", abs(survival - 1), limit, reason)


def is_judged(weight: StoredWeight, sums: Sums) -> bool:
    """Whether survival says something of the delta, and not of the grid that the base is on."""
    return sums.delta > 0 and weight.group > 1 and (sums.varied or weight.group >= SPANNING_COLUMNS)


def _place(worst: Worst, weight: StoredWeight) -> str:
    if weight.group == 1:
        return f"column {worst.column} of row {worst.row}"
    return f"columns {worst.column} to {worst.column + weight.group - 1} of row {worst.row}"
