"""Decoding of stored floats with numpy, for the checks that must not wait for torch to be imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def as_float32(raw: bytearray | bytes | memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Decode raw little-endian F32, F16 or BF16 data.

    Args:
        raw: the bytes.
        dtype: `F32`, `F16` or `BF16`.

    Returns:
        float32 values, one-dimensional; exact for all three.
    """
    if dtype == "F32":
        return np.frombuffer(raw, dtype="<f4")
    if dtype == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        wide: npt.NDArray[Any] = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    raise ValueError(f"{dtype} is not a float type that is read here")
