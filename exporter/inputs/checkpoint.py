"""Safetensors checkpoints, read as bounded row blocks.

A memory-mapped file counts as resident memory as its pages are touched, so nothing is mapped here: rows are read with
`os.preadv` into a buffer that the caller owns. Headers are checked before anything is trusted, following the format's
own rules (https://github.com/huggingface/safetensors, "Format"): an 8-byte little-endian header length, a JSON object,
and data offsets that cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from exporter.errors import InvalidHeaderError, MissingFileError, MissingShardError, TruncatedFileError, UnsafePathError

# Bytes an element of each dtype that the format defines.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})

# The reference implementation refuses longer headers (MAX_HEADER_SIZE in safetensors/src/tensor.rs).
MAX_HEADER_BYTES = 100_000_000

_SHARD_NAME = re.compile(r".*-\d+-of-(?P<count>\d+)\.safetensors")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk.

    Attributes:
        name: its name in the file.
        dtype: the format's dtype name, for example `BF16`.
        shape: its dimensions, outermost first.
        file: the file that holds it.
        start: offset in bytes of its first element from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def columns(self) -> int:
        """Elements in a row: the innermost dimension (1 for a scalar)."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows when seen as a matrix: the product of all dimensions but the innermost."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one safetensors file.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        MissingFileError: the file is not there.
        TruncatedFileError: the file is shorter than the header says.
        InvalidHeaderError: the header is not JSON, names a tensor twice, has an unknown dtype, or offsets that do not
            match the shapes, overlap, or leave a hole.
    """
    if not file.is_file():
        raise MissingFileError(str(file), found="no such file", expected="a safetensors file", remedy="Check the path.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size < 8 + min(length, MAX_HEADER_BYTES):
            raise truncated(file, size, 8 + length)
        if length > MAX_HEADER_BYTES:
            raise _invalid(file, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _invalid(
            file, f"a header that is not JSON ({error})", "one JSON object without duplicate names"
        ) from None
    if not isinstance(header, dict):
        raise _invalid(file, f"a header that is a {type(header).__name__}", "a JSON object")
    header.pop("__metadata__", None)
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_coverage(file, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _stored(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Check one entry of a header and turn it into a `StoredTensor`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _invalid(file, f"the name {name!r}", "names that are text") from None
    thing = f"{file.name}: {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _invalid(thing, f"the entry {str(entry)[:80]}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _invalid(thing, f"the dtype {str(dtype)[:80]!r}", "one of " + " ".join(DTYPE_BYTES))
    if not _naturals(shape):
        raise _invalid(thing, f"the shape {str(shape)[:80]}", "a list of non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _invalid(thing, f"the data_offsets {str(offsets)[:80]}", "two non-negative integers")
    tensor = StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        found = f"{offsets[1] - offsets[0]} bytes of data"
        raise _invalid(thing, found, f"as many as {dtype} {str(shape)[:80]} takes")
    return tensor


def _naturals(value: Any) -> bool:
    # The format's integers have 64 bits, and so have a file's offsets.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_coverage(file: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The data must follow the header without overlap or hole and end where the file ends."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise _invalid(f"{file.name}: {tensor.name}", f"data that {kind}", f"data at byte {position}")
        position += tensor.nbytes
    if position > size:
        raise truncated(file, size, position)
    if position < size:
        raise _invalid(file.name, f"{size - position} bytes after the last tensor", "the file to end there")


def _invalid(thing: Path | str, found: str, expected: str) -> InvalidHeaderError:
    return InvalidHeaderError(
        str(thing), found=found, expected=expected, remedy="The file is damaged or hostile: fetch or save it again."
    )


def truncated(file: Path, size: int, expected: int) -> TruncatedFileError:
    """A file that ends after `size` bytes."""
    return TruncatedFileError(
        str(file),
        found=f"{size} bytes",
        expected=f"{expected} bytes by its own header",
        remedy="The file is incomplete: fetch or copy it again.",
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        MissingFileError: the file is not there.
        InvalidHeaderError: it is not a JSON object.
    """
    if not file.is_file():
        raise MissingFileError(
            str(file), found="no such file", expected=f"a {file.name} in the folder", remedy="Check the path."
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _invalid(file, f"text that is not JSON ({error})", "one JSON object") from None
    if not isinstance(value, dict):
        raise _invalid(file, f"a JSON {type(value).__name__}", "a JSON object")
    return value


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration and where each of its tensors lies.

    Attributes:
        folder: the folder.
        config: `config.json` as read.
        tensors: every tensor by name, in the order of the shards and of the data in them.
        shards: the safetensors files, in order.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Path, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a folder with `config.json` and one or several safetensors files. Reads headers only.

        Raises:
            MissingFileError, MissingShardError, TruncatedFileError, InvalidHeaderError, UnsafePathError: see each.
        """
        if not folder.is_dir():
            raise MissingFileError(
                str(folder), found="no such folder", expected="a model folder", remedy="Check the path or the hub id."
            )
        config = read_json(folder / "config.json")
        index = folder / INDEX_NAME
        # As transformers does: a single file goes before an index.
        single = (folder / SINGLE_NAME).is_file()
        tensors = _from_index(folder, read_json(index)) if index.is_file() and not single else _from_files(folder)
        return cls(folder, config, tensors, tuple(dict.fromkeys(tensor.file for tensor in tensors.values())))


def _from_files(folder: Path) -> dict[str, StoredTensor]:
    """Without an index: `model.safetensors`, or every safetensors file in the folder."""
    single = folder / SINGLE_NAME
    if single.is_file():
        return read_header(single)
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf") for file in folder.glob(pattern))
        raise MissingFileError(
            str(folder),
            found="no safetensors file" + (f", but {', '.join(others[:3])}" if others else ""),
            expected=f"{SINGLE_NAME} or shards with {INDEX_NAME}",
            remedy="Save the model with save_pretrained (safe serialization) first.",
        )
    numbered = [match for file in files if (match := _SHARD_NAME.fullmatch(file.name))]
    if numbered and len(numbered) != int(numbered[0]["count"]):
        raise MissingShardError(
            str(folder),
            found=f"{len(numbered)} shards",
            expected=f"as many as {numbered[0][0]} says",
            remedy="Fetch the shards that are missing.",
        )
    return _joined((file, read_header(file)) for file in files)


def _joined(shards: Iterable[tuple[Path, Mapping[str, StoredTensor]]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in shards:
        for name, tensor in header.items():
            if name in tensors:
                raise _invalid(name, f"the name in {tensors[name].file.name} and in {file.name}", "every name once")
            tensors[name] = tensor
    return tensors


def _from_index(folder: Path, index: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """By index: each name must be in the shard that the index says, and shards may hold nothing else."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _invalid(folder / INDEX_NAME, "no weight_map", "a weight_map from tensor names to files")
    headers: list[tuple[Path, dict[str, StoredTensor]]] = []
    for shard in sorted(set(map(str, weight_map.values()))):
        headers.append((folder / shard, read_header(_shard_file(folder, shard))))
    tensors = _joined(headers)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            where = tensors[name].file.name if name in tensors else "no shard"
            raise _invalid(name, f"the tensor in {where}", f"it in {shard}, as {INDEX_NAME} says")
    if extra := sorted(tensors.keys() - weight_map.keys()):
        raise _invalid(extra[0], f"a tensor in {tensors[extra[0]].file.name}", f"{INDEX_NAME} to name it")
    return tensors


def _shard_file(folder: Path, shard: str) -> Path:
    """A shard named by an index must be a plain file name inside the folder.

    Links are followed on purpose: a hub cache is a folder of links. What is refused is a name that climbs out.
    """
    if Path(shard).name != shard or shard in {"", ".", ".."} or "\\" in shard:
        raise UnsafePathError(
            f"{INDEX_NAME}: {shard!r}",
            found="a path",
            expected="the plain name of a file beside the index",
            remedy="The index is damaged or hostile: fetch it again.",
        )
    try:
        present = (folder / shard).is_file()
    except OSError:
        # A name that no file can have.
        present = False
    if not present:
        raise MissingShardError(
            shard,
            found="no such file in the folder",
            expected=f"the shard that {INDEX_NAME} names",
            remedy="Fetch the shard that is missing.",
        )
    return folder / shard
