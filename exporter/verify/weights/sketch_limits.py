"""Sketches of the weights: enough of them in a reference pack to see where an artifact's are off, without the base.

Of each row of a matrix, every run of 512 columns is kept as one number: the sum of its elements, each with a sign that
is drawn once for its column. That is linear, so the sketch of an artifact's weights minus that of the merge is the
sketch of the error E. Signs that have nothing to do with E make its mean square |E|^2 of the run: the sum of squares
over a tensor estimates |E|^2, and products of two sketches inner products (Alon, Matias and Szegedy 1996, "The space
complexity of approximating the frequency moments"). With n runs the relative standard error of |E|^2 is sqrt(2/n), and
<E, D> has the variance |E|^2 |D|^2 / n, so the figures are those of `exporter.verify.weights.sums` with runs in place
of elements: what these say of a tensor, sketches say with wider limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exporter.backends.weight_reader import StoredWeight
from exporter.plan.reference_pack import RUN
from exporter.reference.pack.sketch import by_run, sketch
from exporter.verify.weights.limits import LimitCheck, is_judged, survival_check
from exporter.verify.weights.sums import Sums, Worst

# Of a type's limit on the relative error of a tensor, how far the sketch of a run may be off in multiples of the run's
# norm: three standard errors of what the type leaves on Gaussian weights are one such limit.
RUN_SHARE = 4.0
# Of clipped types, whose groups may lose any value that hardly meets an input, so much of a group's limit more.
CLIPPED_SHARE = 0.1
# -log of the chance that the sum of squares of sound errors is taken for too large.
_RARE = 25.0
_TINY = 1e-30

Floats = npt.NDArray[np.float32]


def estimated_sums(stored: Floats, merged: Floats, delta: Floats | None, weight: StoredWeight, first: int = 0) -> Sums:
    """Sums of some rows, with runs for elements; of groups, the run that is farthest off.

    Args:
        stored: what the artifact holds: float32, shape (rows, columns).
        merged: the merge's sketch: float32, shape (rows, runs).
        delta: the sketch of the adapter's change, likewise; None where the tensor has none.
        weight: its tolerance.
        first: number of the first row.
    """
    error = sketch(stored) - merged
    norms = by_run(stored, stored)
    allowed = np.float32(RUN_SHARE * weight.tolerance.resolution * math.sqrt(min(RUN, stored.shape[1])))
    # Of what was stored as zeros, the merge's own sketch says how much it should have been.
    sizes, finite = np.sqrt(np.maximum(norms, merged**2)) + np.float32(_TINY), np.isfinite(norms)
    # What has no finite square is as far off as may be, and all of the rows with it.
    ratio = np.full_like(error, np.inf)
    np.divide(np.maximum(np.abs(error) - allowed, 0), sizes, out=ratio, where=finite)
    known = bool(finite.all())
    squares = _product(error, error) if known else math.inf
    size = (known and float(norms.sum(dtype=np.float64))) or _product(merged, merged)
    row, run = divmod(int(ratio.argmax()), ratio.shape[1])
    sums = Sums(
        error.size, squares, size,
        group=Worst(float(ratio[row, run]), first + row, run * RUN),
    )  # fmt: skip
    if delta is None:
        return sums
    squared, error_delta, base_delta = _product(delta, delta), _product(error, delta), _product(merged - delta, delta)
    return replace(sums, delta=squared, error_delta=error_delta, base_delta=base_delta)


def _product(left: Floats, right: Floats) -> float:
    return float(np.multiply(left, right, dtype=np.float64).sum())


def estimate_checks(weight: StoredWeight, sums: Sums) -> Iterator[LimitCheck]:
    """What a stored weight is held to by its sketch."""
    name, runs = weight.source, max(sums.elements, 1)
    # Of n squares of standard normal variables the sum is below n + 2 sqrt(n x) + 2 x but for a chance of exp(-x)
    # (Laurent and Massart 2000, "Adaptive estimation of a quadratic functional by model selection").
    limit = weight.tolerance.error * math.sqrt(1 + 2 * math.sqrt(_RARE / runs) + 2 * _RARE / runs)
    run, error = sums.group, sums.relative_error
    columns = min(RUN, weight.shape[-1] - run.column if weight.shape else 1)
    place = f"columns {run.column} to {run.column + columns - 1} of row {run.row}"
    farthest = f", {place} the most" if run.value else ""
    reason = f"{name} is about {error:.2%} off by its sketch{farthest}; {weight.type} leaves at most {limit:.2%}"
    yield LimitCheck("relative_error", error, limit, reason)
    limit = RUN_SHARE * weight.tolerance.error + CLIPPED_SHARE * weight.tolerance.group * weight.tolerance.clipped
    reason = f"{name}: {place} are about {run.value:.2%} off by their sketch, the limit is {limit:.2%}"
    yield LimitCheck("group", run.value, limit, reason, run.row, run.column)
    if is_judged(weight, sums):
        yield survival_check(sums, f"{name}: of the adapter's change")
