"""In how many blocks a flipped bit of a scale is seen without scoring, by GGUF type and bit.

    python -m scripts.measurements.scale_bits [--blocks 400] [--types Q4_K …] [--json FILE]

Gaussian weights of a deviation of 0.02 are quantized by ggml, without importances and with such as are as uneven as
exp(1.5 · normal). In each block one bit of the float16 scale, or of the minimum, is flipped, and
`exporter.backends.gguf.blocks.impossible_groups` is asked whether the block can be ggml's. Bits are numbered from the
lowest of the mantissa (0 to 9) over the exponent (10 to 14) to the sign. What lies above 9 is left out: limits on
errors see those.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from exporter.backends.gguf.blocks.ggml import quantize_rows
from exporter.backends.gguf.blocks.impossible_groups import impossible_groups
from exporter.backends.gguf.blocks.layouts import CODINGS
from exporter.backends.gguf.file_types import BLOCK_SIZES
from exporter.inputs.row_blocks import Workspace
from scripts.tables import table, write_json

Floats = npt.NDArray[np.float32]
# Where a block has its scale and its minimum (ggml/src/ggml-common.h of llama.cpp).
PLACES = {
    "Q8_0": (0,), "Q5_0": (0,), "Q4_0": (0,), "Q5_1": (0, 2), "Q4_1": (0, 2), "Q6_K": (208,), "Q5_K": (0, 2),
    "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82), "IQ4_XS": (0,), "IQ4_NL": (0,),
}  # fmt: skip
BITS = range(10)


def shares(kind: str, byte: int, values: Floats, importance: Floats | None) -> list[float]:
    """Of blocks in which a bit is flipped, how many are seen, by bit.

    Args:
        kind: the type.
        byte: where the float16 is in a block.
        values: one block a row.
        importance: of its columns; None for none.
    """
    (rows, columns), nbytes = values.shape, BLOCK_SIZES[kind][1]
    stored = quantize_rows(kind, values.ctypes.data, rows, columns, rows * nbytes, importance)
    raw, workspace = np.frombuffer(stored, np.uint8).reshape(rows, nbytes), Workspace()
    found = []
    for bit in BITS:
        flipped = raw.copy()
        flipped[:, byte + bit // 8] ^= np.uint8(1 << bit % 8)
        read = dequantize(flipped, GGMLQuantizationType[kind]).astype(np.float32, copy=False)
        # Of blocks of several groups one at a time is asked for, as groups are counted.
        several = columns > CODINGS[kind].group
        parts = [slice(row, row + 1) for row in range(rows)] if several else [slice(None)]
        options: dict[str, Any] = {"weighed": importance is not None, "importance": importance, "workspace": workspace}
        counts = [impossible_groups(kind, flipped[part], read[part], values[part], **options).count for part in parts]
        found.append(sum(min(count, 1) for count in counts) / rows if several else counts[0] / rows)
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=400)
    parser.add_argument("--types", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    figures = []
    for kind in arguments.types:
        columns = BLOCK_SIZES[kind][0]
        values = (0.02 * generator.standard_normal((arguments.blocks, columns))).astype(np.float32)
        uneven = np.exp(1.5 * generator.standard_normal(columns)).astype(np.float32)
        # Q8_0 weighs nothing.
        for importance in (None, uneven)[: 1 if kind == "Q8_0" else 2]:
            for what, byte in zip(("scale", "minimum"), PLACES[kind], strict=False):
                found = shares(kind, byte, values, importance)
                figures.append({"type": kind, "what": what, "weighed": importance is not None, "seen": found})
    header = ["type", "of the", "importances", *(f"bit {bit}" for bit in BITS)]
    rows = [
        [one["type"], one["what"], "yes" if one["weighed"] else "no", *(f"{share:.1%}" for share in one["seen"])]
        for one in figures
    ]
    print(table(header, rows))
    write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
