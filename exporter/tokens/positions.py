"""The number of positions of a model, and the check that windows fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporter.errors import RecipeError


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model takes at once: `max_position_embeddings`, or the number its rope is scaled to.

    Some configurations with YaRN give the scaled number, Qwen2.5's gives the unscaled one. The larger is right.

    Args:
        config: the model's configuration.

    Returns:
        None if the configuration does not say.
    """
    stated = config.get("max_position_embeddings")
    if type(stated) is not int or stated <= 0:
        return None
    found = stated
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    scalings = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    for scaling in scalings:
        if not isinstance(scaling, Mapping):
            continue
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and 1 <= factor < math.inf:
            found = max(found, int((original if type(original) is int else stated) * factor))
    return found


def check_windows(config: Mapping[str, Any], *, evaluation: int | None, calibration: int | None) -> None:
    """Check that windows are not longer than the model takes.

    Args:
        config: the model's configuration.
        evaluation: tokens in an evaluation window; None if there are none.
        calibration: tokens in a calibration window; None if there are none.

    Raises:
        RecipeError: a window is longer.
    """
    positions = positions_of(config)
    for option, window in (("--eval-window", evaluation), ("--window", calibration)):
        if positions is not None and window is not None and window > positions:
            raise RecipeError(
                f"{option} {window}",
                found=f"windows of {window} tokens",
                expected=f"at most {positions}, the positions that the model has (max_position_embeddings)",
                remedy=f"Give {option} {positions}, or less.",
            )
