"""Compare two GGUF files tensor by tensor and metadata key by key.

    python -m scripts.oracles.compare_gguf OURS THEIRS
    python -m scripts.oracles.compare_gguf OURS THEIRS --allow-blocks-share 1e-6 --allow-metadata general.name

Exit status 0: same tensors with the same shapes and types, no more blocks differ than allowed, and no metadata key
differs that is not allowed to. 1: anything else. 2: a file that cannot be read. The order of tensors and keys is
reported and is not a difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from scripts.tables import table, write_json

BLOCKS_AT_ONCE = 1 << 18
SHOWN = 20
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is in both files and not the same. `why` is shape, type or data.

    Blocks are the type's own (one element for F32, F16 and BF16); `elements` counts dequantized values that differ and
    `largest` is the largest difference between two of them. All are zero where shape or type differ.
    """

    name: str
    why: str
    ours: str
    theirs: str
    blocks: int = 0
    elements: int = 0
    largest: float = 0.0


@dataclass(frozen=True)
class MetadataDifference:
    """One metadata key whose type or value is not the same; values are shortened."""

    key: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Comparison:
    """All that differs between two GGUF files, and how much there is of what was compared."""

    tensors_equal: int
    tensors: tuple[TensorDifference, ...]
    tensors_only_ours: tuple[str, ...]
    tensors_only_theirs: tuple[str, ...]
    same_tensor_order: bool
    blocks: int
    elements: int
    metadata_equal: int
    metadata: tuple[MetadataDifference, ...]
    metadata_only_ours: tuple[str, ...]
    metadata_only_theirs: tuple[str, ...]
    same_metadata_order: bool

    @property
    def blocks_share(self) -> float:
        """Share of the compared blocks that differ."""
        return sum(tensor.blocks for tensor in self.tensors) / max(self.blocks, 1)

    @property
    def structure_equal(self) -> bool:
        """Whether both files hold the same tensors with the same shapes and types."""
        only = self.tensors_only_ours or self.tensors_only_theirs
        return not only and all(tensor.why == "data" for tensor in self.tensors)

    def metadata_differing(self, allowed: Sequence[str] = ()) -> list[str]:
        """Keys that differ or that one file lacks, without those that match an allowed pattern."""
        keys = [entry.key for entry in self.metadata] + [*self.metadata_only_ours, *self.metadata_only_theirs]
        return [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in allowed)]

    def equal(self, allow_blocks_share: float = 0.0, allow_metadata: Sequence[str] = ()) -> bool:
        """Whether the files are the same up to a share of blocks and a list of metadata keys (patterns)."""
        tensors = self.structure_equal and self.blocks_share <= allow_blocks_share
        return tensors and not self.metadata_differing(allow_metadata)


@dataclass(frozen=True)
class _Value:
    """One metadata value: a digest of its bytes, and how to show it."""

    digest: str
    shown: str


def compare(ours: Path, theirs: Path) -> Comparison:
    """Compare two GGUF files. Both are mapped; beyond that, memory does not grow with their tensors."""
    our_tensors, our_keys = _read(ours)
    their_tensors, their_keys = _read(theirs)
    shared = [name for name in our_tensors if name in their_tensors]
    compared = [compare_tensor(our_tensors[name], their_tensors[name]) for name in shared]
    keys = [key for key in our_keys if key in their_keys]
    changed = [key for key in keys if our_keys[key].digest != their_keys[key].digest]
    return Comparison(
        tensors_equal=sum(difference is None for difference in compared),
        tensors=tuple(difference for difference in compared if difference is not None),
        tensors_only_ours=tuple(name for name in our_tensors if name not in their_tensors),
        tensors_only_theirs=tuple(name for name in their_tensors if name not in our_tensors),
        same_tensor_order=list(our_tensors) == list(their_tensors),
        blocks=sum(_block_count(our_tensors[name]) for name in shared),
        elements=sum(int(our_tensors[name].n_elements) for name in shared),
        metadata_equal=len(keys) - len(changed),
        metadata=tuple(MetadataDifference(key, our_keys[key].shown, their_keys[key].shown) for key in changed),
        metadata_only_ours=tuple(key for key in our_keys if key not in their_keys),
        metadata_only_theirs=tuple(key for key in their_keys if key not in our_keys),
        same_metadata_order=list(our_keys) == list(their_keys),
    )


def compare_tensor(ours: Any, theirs: Any) -> TensorDifference | None:
    """Compare two tensors of a GGUFReader; None where type, shape and every byte are the same."""
    if ours.tensor_type != theirs.tensor_type:
        return TensorDifference(ours.name, "type", ours.tensor_type.name, theirs.tensor_type.name)
    if tuple(ours.shape) != tuple(theirs.shape):
        return TensorDifference(ours.name, "shape", _shape(ours), _shape(theirs))
    blocks = elements = 0
    largest = 0.0
    for our_blocks, their_blocks in _differing_blocks(ours, theirs):
        our_values = _dequantize(our_blocks, ours.tensor_type)
        their_values = _dequantize(their_blocks, ours.tensor_type)
        blocks += len(our_blocks)
        differing = (our_values != their_values) & ~(np.isnan(our_values) & np.isnan(their_values))
        elements += int(np.count_nonzero(differing))
        with np.errstate(invalid="ignore"):
            gap = np.abs(our_values[differing].astype(np.float64) - their_values[differing])
        largest = max([largest, *np.nan_to_num(gap, nan=np.inf).max(initial=0.0, keepdims=True).tolist()])
    if blocks == 0:
        return None
    kind = ours.tensor_type.name
    return TensorDifference(ours.name, "data", kind, kind, blocks, elements, largest)


def show(field: Any, limit: int = 60) -> str:
    """Type and shortened value of a metadata field, e.g. `UINT32 24` or `ARRAY[STRING] 151936 of ['!', …`."""
    kinds = [kind.name for kind in field.types]
    count = ""
    if kinds[0] == "ARRAY":
        kinds = [f"ARRAY[{kinds[-1]}]"]
        count = f"{len(field.data)} of "
        value = repr([field.contents(index) for index in range(min(len(field.data), 6))])
    else:
        value = repr(field.contents())
    return f"{kinds[0]} {count}{value if len(value) <= limit else value[:limit] + '…'}"


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no annotations
    """gguf's reader, slicing a plain array instead of numpy's memmap: half the time for a large vocabulary."""

    data: npt.NDArray[Any]

    def _get(self, *args: Any, **options: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)
        return super()._get(*args, **options)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, _Value]]:
    """Tensors and metadata of a file; `GGUF.version` and the two counts, which the reader adds, are left out."""
    reader = _Reader(path)
    metadata = {}
    for key, value in reader.fields.items():
        if not key.startswith("GGUF."):
            # A field's parts are its bytes as the file holds them: key, type and value.
            digest = hashlib.sha256(b"".join(part.tobytes() for part in value.parts)).hexdigest()
            metadata[key] = _Value(digest, show(value))
    reader.fields.clear()  # some hundred thousand small arrays, for a vocabulary and its merges
    return {tensor.name: tensor for tensor in reader.tensors}, metadata


def _blocks(tensor: Any) -> Bytes:
    """A tensor's bytes as [blocks, bytes of a block], still mapped."""
    type_size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    return np.asarray(tensor.data).reshape(-1).view(np.uint8).reshape(-1, type_size)


def _block_count(tensor: Any) -> int:
    block_size: int = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
    return int(tensor.n_elements) // block_size


def _differing_blocks(ours: Any, theirs: Any) -> Iterator[tuple[Bytes, Bytes]]:
    """The blocks of two tensors of one type and shape that differ, some at a time."""
    our_blocks, their_blocks = _blocks(ours), _blocks(theirs)
    for start in range(0, len(our_blocks), BLOCKS_AT_ONCE):
        left, right = our_blocks[start : start + BLOCKS_AT_ONCE], their_blocks[start : start + BLOCKS_AT_ONCE]
        if not np.array_equal(left, right):
            differing = (left != right).any(axis=1)
            yield left[differing], right[differing]


def _dequantize(blocks: Bytes, kind: Any) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(np.ascontiguousarray(blocks), kind)
    return values


def _shape(tensor: Any) -> str:
    return "x".join(str(int(size)) for size in tensor.shape)


def _counts(tensor: TensorDifference) -> list[str]:
    return [f"{tensor.blocks:,}", f"{tensor.elements:,}", f"{tensor.largest:.3g}"]


def print_comparison(found: Comparison, allow_metadata: Sequence[str] = ()) -> None:
    """Print what differs, the first lines of each kind."""
    differing = sum(tensor.blocks for tensor in found.tensors)
    elements = sum(tensor.elements for tensor in found.tensors)
    largest = max((tensor.largest for tensor in found.tensors), default=0.0)
    print(f"tensors   {found.tensors_equal} equal, {len(found.tensors)} differ, same order: {found.same_tensor_order}")
    print(f"blocks    {differing:,} of {found.blocks:,} differ ({found.blocks_share:.3g})")
    print(f"elements  {elements:,} of {found.elements:,} differ, by at most {largest:.3g}")
    print(
        f"metadata  {found.metadata_equal} equal, {len(found.metadata)} differ, of them and those in one file "
        f"{len(found.metadata_differing(allow_metadata))} not allowed, same order: {found.same_metadata_order}"
    )
    for title, names in (
        ("tensors only in ours", found.tensors_only_ours),
        ("tensors only in theirs", found.tensors_only_theirs),
        ("metadata only in ours", found.metadata_only_ours),
        ("metadata only in theirs", found.metadata_only_theirs),
    ):
        if names:
            print(f"{title}: {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}")
    for entry in found.metadata:
        print(f"  {entry.key}\n    ours    {entry.ours}\n    theirs  {entry.theirs}")
    if found.tensors:
        rows = [
            [tensor.name, tensor.why, tensor.ours, tensor.theirs, *_counts(tensor)] for tensor in found.tensors[:SHOWN]
        ]
        print(table(["tensor", "differs in", "ours", "theirs", "blocks", "elements", "largest"], rows))
    if len(found.tensors) > SHOWN:
        print(f"… and {len(found.tensors) - SHOWN} more")


def main() -> int:
    """Compare two files, print and write what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--allow-blocks-share", type=float, default=0.0, metavar="SHARE", help="default: 0")
    parser.add_argument("--allow-metadata", action="append", default=[], metavar="PATTERN", help="repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    args = parser.parse_args()
    try:
        found = compare(args.ours, args.theirs)
    except (OSError, EOFError, ValueError) as error:
        print(f"compare_gguf: {error}", file=sys.stderr)
        return 2
    print_comparison(found, args.allow_metadata)
    equal = found.equal(args.allow_blocks_share, args.allow_metadata)
    figures = dataclasses.asdict(found) | {"blocks_share": found.blocks_share, "equal": equal}
    write_json(args.json, figures)
    print("equal" if equal else "not equal")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
