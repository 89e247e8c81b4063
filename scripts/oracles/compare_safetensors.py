"""Compare the weights of two model folders (or single safetensors files) bit by bit.

    python -m scripts.oracles.compare_safetensors OURS THEIRS
    python -m scripts.oracles.compare_safetensors OURS THEIRS --min-equal 0.9999 --max-ulp 1

Exit status 0: same names, dtypes and shapes, at least `--min-equal` of all elements bit-equal, and none further apart
than `--max-ulp` units in the last place. 1: anything else. 2: a file that cannot be read.
Reads a few megabytes at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.tables import table, write_json

BYTES_AT_ONCE = 1 << 24
SHOWN = 20
# Bits as a signed integer of the same width; a unit in the last place is a step of one in their order.
FLOATS: dict[str, npt.DTypeLike] = {"BF16": np.int16, "F16": np.int16, "F32": np.int32}
INFINITY_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorComparison:
    """One tensor that both have: elements, how many are not bit-equal, and the largest distance in units in the last
    place (of a NaN and a number: the number of values there are). `mismatch` says that dtype or shape differ."""

    name: str
    elements: int
    differing: int
    max_ulp: int
    mismatch: str = ""


@dataclass(frozen=True)
class Comparison:
    """All tensors compared, and the names that only one of the two has."""

    tensors: tuple[TensorComparison, ...]
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]

    @property
    def equal_share(self) -> float:
        """Share of all elements that are bit-equal."""
        elements = sum(tensor.elements for tensor in self.tensors)
        return 1 - sum(tensor.differing for tensor in self.tensors) / max(elements, 1)

    @property
    def max_ulp(self) -> int:
        """The largest distance of two elements in units in the last place."""
        return max((tensor.max_ulp for tensor in self.tensors), default=0)

    @property
    def structure_equal(self) -> bool:
        """Whether names, dtypes and shapes are the same."""
        return not (self.only_ours or self.only_theirs or any(tensor.mismatch for tensor in self.tensors))

    def equal(self, min_equal: float = 1.0, max_ulp: int = 0) -> bool:
        """Whether the two agree within the given bounds."""
        return self.structure_equal and self.equal_share >= min_equal and self.max_ulp <= max_ulp


def compare(ours: Path, theirs: Path) -> Comparison:
    """Compare two safetensors files or model folders."""
    left, right = entries(ours), entries(theirs)
    return Comparison(
        tensors=tuple(compare_tensor(name, left[name], right[name]) for name in left if name in right),
        only_ours=tuple(name for name in left if name not in right),
        only_theirs=tuple(name for name in right if name not in left),
    )


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a file or folder, read from the headers alone."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: found no safetensors file")
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in _header(file):
            if name in found:
                raise ValueError(f"{name} is in {found[name].path.name} and in {file.name}")
            found[name] = entry
    return found


def compare_tensor(name: str, ours: Entry, theirs: Entry) -> TensorComparison:
    """Compare one tensor, some megabytes at a time."""
    count = int(np.prod(ours.shape, dtype=np.int64))
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        mismatch = f"{ours.dtype} {list(ours.shape)} and {theirs.dtype} {list(theirs.shape)}"
        return TensorComparison(name, count, count, 0, mismatch)
    differing = furthest = 0
    for left, right in zip(_chunks(ours), _chunks(theirs), strict=True):
        unequal = left != right
        some = int(np.count_nonzero(unequal))
        if some:
            differing += some
            furthest = max(furthest, _ulps(left[unequal], right[unequal], ours.dtype))
    return TensorComparison(name, count, differing, furthest)


def _ulps(left: npt.NDArray[Any], right: npt.NDArray[Any], dtype: str) -> int:
    """The largest distance between two arrays of bits; 1 for a dtype that is not floating point."""
    if dtype not in FLOATS:
        return 1
    infinity = INFINITY_BITS[dtype]
    bits = left.dtype.itemsize * 8
    ordered = []
    for values in (left.astype(np.int64), right.astype(np.int64)):
        magnitude = values & ((1 << (bits - 1)) - 1)
        position = np.where(values < 0, -magnitude, magnitude)
        ordered.append(np.where(magnitude > infinity, 1 << bits, position))
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))


def _header(path: Path) -> Iterator[tuple[str, Entry]]:
    """Names and places of a file's tensors, in the header's order."""
    with path.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        header = json.loads(data.read(length))
    for name, value in header.items():
        if name != "__metadata__":
            start, end = value["data_offsets"]
            yield name, Entry(path, value["dtype"], tuple(value["shape"]), 8 + length + start, end - start)


def _chunks(entry: Entry) -> Iterator[npt.NDArray[Any]]:
    """A tensor's bits, as integers of the element's size."""
    kind = np.dtype(FLOATS.get(entry.dtype, np.uint8))
    with entry.path.open("rb", buffering=0) as data:
        data.seek(entry.start)
        left = entry.nbytes
        while left:
            wanted = min(left, BYTES_AT_ONCE)
            block = np.fromfile(data, dtype=kind, count=wanted // kind.itemsize)
            if block.nbytes != wanted:
                raise EOFError(f"{entry.path.name} ends {left - block.nbytes} bytes too early")
            left -= wanted
            yield block


def print_comparison(found: Comparison) -> None:
    """Print the totals and the tensors that differ most."""
    elements = sum(tensor.elements for tensor in found.tensors)
    differing = [tensor for tensor in found.tensors if tensor.differing or tensor.mismatch]
    print(f"tensors   {len(found.tensors) - len(differing)} equal, {len(differing)} differ")
    print(f"elements  {found.equal_share:.7%} of {elements:,} bit-equal, furthest {found.max_ulp} ulp")
    for title, names in (("only in ours", found.only_ours), ("only in theirs", found.only_theirs)):
        if names:
            print(f"{title}: {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}")
    worst = sorted(differing, key=lambda tensor: tensor.differing / max(tensor.elements, 1), reverse=True)[:SHOWN]
    if worst:
        rows = [
            [tensor.name, f"{tensor.elements:,}", f"{tensor.differing:,}", str(tensor.max_ulp), tensor.mismatch]
            for tensor in worst
        ]
        print(table(["tensor", "elements", "differing", "ulp", "mismatch"], rows))
    if len(differing) > SHOWN:
        print(f"… and {len(differing) - SHOWN} more")


def main() -> int:
    """Compare two folders or files, print and write what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--min-equal", type=float, default=1.0, metavar="SHARE", help="default: 1, all of them")
    parser.add_argument("--max-ulp", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    args = parser.parse_args()
    try:
        found = compare(args.ours, args.theirs)
    except (OSError, EOFError, ValueError) as error:
        print(f"compare_safetensors: {error}", file=sys.stderr)
        return 2
    print_comparison(found)
    equal = found.equal(args.min_equal, args.max_ulp)
    totals = {"equal_share": found.equal_share, "max_ulp": found.max_ulp, "equal": equal}
    write_json(args.json, totals | dataclasses.asdict(found))
    print("equal within the bounds" if equal else "not equal within the bounds")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
