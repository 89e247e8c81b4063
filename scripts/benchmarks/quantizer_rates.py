"""How fast ggml quantizes each type: millions of elements a second of CPU time, which the plan's estimate rests on.

    python -m scripts.benchmarks.quantizer_rates [--rows 256] [--columns 4096] [--json FILE]

Rows of normal values with an importance for each column, as with an importance matrix.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS, quantize_rows
from exporter.backends.gguf.file_types import FLOAT_TYPES, row_bytes
from scripts.benchmarks.measure import machine
from scripts.tables import table, write_json


def rate(kind: str, values: npt.NDArray[np.float32], importance: npt.NDArray[np.float32]) -> float:
    """Elements a second of CPU time; the fastest of three runs, as the machine may be shared."""
    rows, columns = values.shape
    size = rows * row_bytes(kind, columns)
    found = []
    for _ in range(3):
        start = time.thread_time()
        quantize_rows(kind, values.ctypes.data, rows, columns, size, importance)
        found.append(values.size / (time.thread_time() - start))
    return max(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    values = random.standard_normal((args.rows, args.columns), dtype=np.float32)
    importance = random.chisquare(4, args.columns).astype(np.float32)
    kinds = [kind for kind in TYPE_NUMBERS if kind not in FLOAT_TYPES]
    rates = {kind: rate(kind, values, importance) for kind in kinds}
    print(f"{'machine':20} {machine()}")
    print(table(["type", "M elements/s"], [[kind, f"{found / 1e6:.1f}"] for kind, found in rates.items()]))
    write_json(args.json, {"machine": machine(), "rates": rates})


if __name__ == "__main__":
    main()
