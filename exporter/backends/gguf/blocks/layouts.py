"""Scales of quantized blocks, unpacked: every value of a group of columns is scale · code + offset.

Layouts are those of ggml-common.h, the packing of scales that of the `dequantize_row_*` in ggml-quants.c (llama.cpp,
ggml/src).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Scales = tuple[Floats, Floats | None]


@dataclass(frozen=True)
class Coding:
    """How a type writes a group of columns.

    Attributes:
        group: columns that share a scale.
        nbytes: bytes of a block, which is one group or several.
        lowest: smallest code.
        highest: largest code.
        scales: of blocks, uint8 [blocks, nbytes], the scale and the offset of each group, both float32
            [blocks, groups in a block]; None for an offset of zero. What overflows is not finite.
    """

    group: int
    nbytes: int
    lowest: int
    highest: int
    scales: Callable[[Bytes], Scales]


def _halves(blocks: Bytes, start: int) -> Floats:
    """The float16 at a byte of each block: float32 [blocks, 1]."""
    return blocks.view("<f2")[:, start // 2, None].astype(np.float32)


def _plain(start: int = 0) -> Callable[[Bytes], Scales]:
    return lambda blocks: (_halves(blocks, start), None)


def _with_minimum(blocks: Bytes) -> Scales:
    return _halves(blocks, 0), _halves(blocks, 2)


def _q2_k(blocks: Bytes) -> Scales:
    packed = blocks[:, :16]
    return _halves(blocks, 80) * (packed & 15), -_halves(blocks, 82) * (packed >> 4)


def _q3_k(blocks: Bytes) -> Scales:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _halves(blocks, 108) * ((low | high << 4).astype(np.int8) - np.int8(32)), None


def _q4_k(blocks: Bytes) -> Scales:
    """Of Q5_K, too: `get_scale_min_k4`."""
    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (both & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, both >> 4 | (second >> 6) << 4], axis=1)
    return _halves(blocks, 0) * scales, -_halves(blocks, 2) * minima


def _q6_k(blocks: Bytes) -> Scales:
    return _halves(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _iq4_xs(blocks: Bytes) -> Scales:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = np.concatenate(
        [blocks[:, 2 + byte, None] >> np.array([0, 2, 4, 6], np.uint8) & 3 for byte in (0, 1)], axis=1
    )
    return _halves(blocks, 0) * ((low | high << 4).astype(np.int8) - np.int8(32)), None


# Types whose scales are known from values and importances.
WEIGHED_TYPES = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
CODINGS: Mapping[str, Coding] = {
    "Q4_0": Coding(32, 18, -8, 7, _plain()),
    "Q4_1": Coding(32, 20, 0, 15, _with_minimum),
    "Q5_0": Coding(32, 22, -16, 15, _plain()),
    "Q5_1": Coding(32, 24, 0, 31, _with_minimum),
    "Q8_0": Coding(32, 34, -127, 127, _plain()),
    "Q2_K": Coding(16, 84, 0, 3, _q2_k),
    "Q3_K": Coding(16, 110, -4, 3, _q3_k),
    "Q4_K": Coding(32, 144, 0, 15, _q4_k),
    "Q5_K": Coding(32, 176, 0, 31, _q4_k),
    "Q6_K": Coding(16, 210, -32, 31, _q6_k),
    "IQ4_NL": Coding(32, 18, -127, 113, _plain()),
    "IQ4_XS": Coding(32, 136, -127, 113, _iq4_xs),
}
