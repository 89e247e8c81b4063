"""What was found in an artifact's stored weights, as `export.json` has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from exporter.backends.weight_reader import StoredWeight
from exporter.families.roles import leaf_of, parse
from exporter.verify.weights.check import NAMED, WeightsResult
from exporter.verify.weights.limits import LimitCheck, is_judged
from exporter.verify.weights.sums import Sums, total


def weights_json(result: WeightsResult | None) -> dict[str, Any] | None:
    """The summary of an artifact; None if its weights were not looked at."""
    if result is None:
        return None
    parts = {"layers": lambda name: parse(name).layer, "kinds": leaf_of}
    # The limit is of the judged ones: the figure is held against it where these are all that changed.
    limit = result.judged.survival_limit if result.judged.elements == result.updated.elements else None
    by_limit = sorted(result.tensors, key=lambda pair: -pair[1].relative_error / pair[0].tolerance.error)
    return {
        **_figures(result.total),
        "survival_stderr": _number(result.updated.survival_stderr),
        "survival_limit": _number(limit),
        "delta_error": _number(result.updated.delta_error),
        "checksums": {"compared": result.checked, "different": list(result.altered)},
        "judged": sum(is_judged(weight, sums) for weight, sums in result.tensors),
        "worst": [
            {
                "name": weight.source,
                "type": weight.type,
                "relative_error": _number(sums.relative_error),
                "limit": _number(weight.tolerance.error),
            }
            for weight, sums in by_limit[:NAMED]
        ],
        "nearest": {measure: _nearest(weight, check) for measure, (weight, check) in result.nearest.items()},
        **{part: _grouped(result, by) for part, by in parts.items()},
        "broken": list(result.broken),
    }


def tensor_figures(result: WeightsResult | None) -> dict[str, dict[str, Any]]:
    """Relative error, and survival where there is a delta, by the stored tensor's name and by the merged one's.

    Of a stored tensor that is made of several merged ones, and the other way round, the figures are of all of it.
    """
    sums: dict[str, list[Sums]] = {}
    for weight, one in result.tensors if result else ():
        for name in {weight.source, weight.name}:
            sums.setdefault(name, []).append(one)
    figures = {name: _figures(parts[0] if len(parts) == 1 else total(parts)) for name, parts in sums.items()}
    return {
        name: {key: value for key, value in one.items() if key != "survival" or value is not None}
        for name, one in figures.items()
    }


def _nearest(weight: StoredWeight, check: LimitCheck) -> dict[str, Any]:
    return {
        "name": weight.source,
        "type": weight.type,
        "value": _number(check.value),
        "limit": _number(check.limit),
        "row": check.row,
        "column": check.column,
    }


def _figures(sums: Sums) -> dict[str, Any]:
    return {"relative_error": _number(sums.relative_error), "survival": _number(sums.survival)}


def _grouped(result: WeightsResult, group_of: Callable[[str], int | str | None]) -> dict[str, dict[str, Any]]:
    """Figures by the group of a tensor's name; tensors of no group are left out.

    The error of the delta is, as that of the whole, of the weights that the adapter changes.
    """
    groups: dict[str, list[Sums]] = {}
    for weight, sums in result.tensors:
        if (group := group_of(weight.source)) is not None:
            groups.setdefault(str(group), []).append(sums)
    return {
        key: _figures(total(parts)) | {"delta_error": _number(total(part for part in parts if part.delta).delta_error)}
        for key, parts in groups.items()
    }


def _number(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None
