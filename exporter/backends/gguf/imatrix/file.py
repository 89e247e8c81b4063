"""Importance matrices: how much an error counts in each input column of a matrix, and llama.cpp's files of them.

An importance is the mean squared input of a column (llama.cpp, tools/imatrix). The file holds sums and counts, in GGUF
(`general.type` is imatrix; tensors NAME.in_sum2 and NAME.counts) or, from before 2025, in a form of its own (.dat).
Read as common/imatrix-loader.cpp reads them in the release inside llama-cpp-python 0.3.36, and written as llama-imatrix
writes them, to the byte.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends.gguf.header import TensorInfo, Value, pack_header, pad
from exporter.errors import RefusalError

Floats = npt.NDArray[np.float32]

_F32 = 0  # ggml_type
# A file of the old form has no sum over tokens but one over calls; its counts are calls.
_LEGACY_CHUNK_SIZE = 1


class ImatrixError(RefusalError):
    """An importance matrix that is not one, is damaged, or is not this model's."""


@dataclass(frozen=True, eq=False)
class Importance:
    """What was collected for one tensor.

    Attributes:
        in_sum2: float32 [groups, columns], the sums of the squared inputs; a group is an expert, or the whole tensor.
        counts: float32 [groups], the numbers of inputs.
    """

    in_sum2: Floats
    counts: Floats

    @property
    def rounded_counts(self) -> Floats:
        """The counts as llama.cpp takes them: whole numbers, halves rounded up (`std::lround`); float32 [groups]."""
        return np.floor(self.counts.astype(np.float64) + 0.5).astype(np.float32)

    @property
    def unseen(self) -> int:
        """Number of groups without any input."""
        return int(np.count_nonzero(self.rounded_counts <= 0))

    def mean(self) -> Floats:
        """The vector that llama-quantize gives to ggml (`load_imatrix` in tools/quantize/quantize.cpp).

        Returns:
            float32 [groups * columns]: in_sum2 / counts, one float32 division each; ones for a group without input.
        """
        counts = self.rounded_counts[:, None]
        found = np.ones_like(self.in_sum2)
        np.divide(self.in_sum2, counts, out=found, where=counts > 0)
        return found.reshape(-1)


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: what was collected, by GGUF tensor name.
        datasets: what the tokens were, as the file says; may be paths.
        chunks: number of windows of tokens, 0 if unknown.
        chunk_size: tokens in one; 1 for a file of the old form.
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def read_imatrix(path: Path) -> Imatrix:
    """Read a file of llama-imatrix in either form.

    Raises:
        ImatrixError: there is no such file, it is damaged or something else, or an entry has no usable numbers.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        found = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path.read_bytes(), path)
    except OSError as error:
        raise ImatrixError(
            str(path), found=error.strerror or str(error), expected="a file of llama-imatrix", remedy="Check --imatrix."
        ) from None
    if not found.entries:
        raise _damaged(path, "no entries")
    for name, entry in found.entries.items():
        check_entry(name, entry)
    return found


def check_entry(name: str, entry: Importance) -> None:
    """Refuse an entry whose numbers cannot weigh anything.

    Raises:
        ImatrixError: a sum or count is NaN, infinite or negative, or no input was counted at all.
    """
    if not np.isfinite(entry.in_sum2).all() or not np.isfinite(entry.counts).all():
        raise _useless(name, "a NaN or an infinity")
    if (entry.in_sum2 < 0).any() or (entry.counts < 0).any():
        raise _useless(name, "a negative sum or count")
    if entry.unseen == len(entry.counts):
        raise _useless(name, "a count of zero")


def check_fit(entries: Mapping[str, Importance], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse entries that are of another model.

    Args:
        entries: an importance matrix.
        shapes: the model's tensors by GGUF name, outermost dimension first.

    Raises:
        ImatrixError: the model has no tensor of that name, or one with other columns or another number of experts.
    """
    for name, entry in entries.items():
        shape = shapes.get(name)
        if shape is None:
            raise ImatrixError(
                f"imatrix entry {name}", found="no such tensor in the model", expected="this model's tensors",
                remedy="Give an importance matrix that was made from this model.",
            )  # fmt: skip
        expected = shape[-1] * prod(shape[:-2])
        if entry.in_sum2.size != expected:
            raise ImatrixError(
                f"imatrix entry {name}", found=f"{entry.in_sum2.size} values",
                expected=f"{expected}, for a tensor of shape {list(shape)}",
                remedy="Give an importance matrix that was made from this model.",
            )  # fmt: skip


def imatrix_bytes(entries: Mapping[str, Importance], datasets: Sequence[str], chunks: int, chunk_size: int) -> bytes:
    """A file in llama.cpp's GGUF form; the same arguments give the same bytes.

    Args:
        entries: what was collected, by GGUF tensor name, in any order.
        datasets: what the tokens were; llama-quantize copies the first into the model's header.
        chunks: number of windows of tokens.
        chunk_size: tokens in one.

    Raises:
        ImatrixError: see `check_entry`.
    """
    for name, entry in entries.items():
        check_entry(name, entry)
    names = _ordered(entries)
    header = _header({name: entries[name].in_sum2.shape for name in names}, datasets, chunks, chunk_size)
    arrays = (array for name in names for array in (entries[name].in_sum2, entries[name].counts))
    return header + b"".join(_padded(np.ascontiguousarray(array, "<f4").tobytes()) for array in arrays)


def imatrix_nbytes(shapes: Mapping[str, tuple[int, int]], datasets: Sequence[str], chunks: int, chunk_size: int) -> int:
    """The size of that file, which needs no more than the entries' groups and columns."""
    ordered = {name: shapes[name] for name in _ordered(shapes)}
    header = _header(ordered, datasets, chunks, chunk_size)
    return len(header) + sum(pad(4 * groups * columns) + pad(4 * groups) for groups, columns in shapes.values())


def _ordered(names: Mapping[str, Any]) -> list[str]:
    """By bytes, as llama-imatrix sorts."""
    return sorted(names, key=str.encode)


def _padded(data: bytes) -> bytes:
    return data + bytes(pad(len(data)) - len(data))


def _header(shapes: Mapping[str, tuple[int, ...]], datasets: Sequence[str], chunks: int, chunk_size: int) -> bytes:
    metadata = {
        "general.type": Value("string", "imatrix"),
        "imatrix.datasets": Value("[string]", list(datasets)),
        "imatrix.chunk_count": Value("uint32", chunks),
        "imatrix.chunk_size": Value("uint32", chunk_size),
    }
    infos: list[TensorInfo] = []
    offset = 0
    for name, (groups, columns) in shapes.items():
        # ggml leaves out outer dimensions of one.
        several = groups > 1
        for suffix, shape in (
            ("in_sum2", (groups, columns) if several else (columns,)),
            ("counts", (groups, 1) if several else (1,)),
        ):
            infos.append(TensorInfo(f"{name}.{suffix}", shape, _F32, offset))
            offset += pad(4 * prod(shape))
    return pack_header(metadata, infos)


def _read_gguf(path: Path) -> Imatrix:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        # Copies: the reader maps the file.
        arrays = {name: np.array(tensor.data) for name, tensor in tensors.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(path, f"a GGUF file that cannot be read ({error})") from None
    if metadata.get("general.type") != "imatrix":
        raise _damaged(path, f"a GGUF file of type {metadata.get('general.type')!r}")
    datasets, chunks, chunk_size = (metadata.get(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size"))
    if not isinstance(datasets, list) or not isinstance(chunks, int) or not isinstance(chunk_size, int):
        raise _damaged(path, "no imatrix.datasets, imatrix.chunk_count or imatrix.chunk_size")
    entries: dict[str, Importance] = {}
    for full_name in arrays:
        name, _, part = full_name.rpartition(".")
        if part not in ("in_sum2", "counts"):
            raise _damaged(path, f"a tensor {full_name}")
        sums, counts = arrays.get(f"{name}.in_sum2"), arrays.get(f"{name}.counts")
        if sums is None or counts is None:
            raise _damaged(path, f"{full_name} without its {'counts' if part == 'in_sum2' else 'in_sum2'}")
        if sums.dtype != np.float32 or counts.dtype != np.float32:
            raise _damaged(path, f"{name} in another type than F32")
        if not sums.size or not counts.size or sums.size % counts.size:
            raise _damaged(path, f"{name} with {sums.size} sums and {counts.size} counts")
        entries[name] = Importance(sums.reshape(counts.size, -1), counts.reshape(-1))
    return Imatrix(entries, tuple(map(str, datasets)), chunks, chunk_size)


def _read_legacy(data: bytes, path: Path) -> Imatrix:
    """The old form: a number of entries, each with name, calls, values (sum over calls); then calls and dataset."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if count < 0 or position + count > len(data):
            raise _damaged(path, "neither a GGUF file nor a whole file of the old form")
        position += count
        return data[position - count : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries: dict[str, Importance] = {}
    for _ in range(integer()):
        name = take(integer()).decode("utf-8", "replace")
        calls, size = integer(), integer()
        sums = np.frombuffer(take(4 * size), "<f4").astype(np.float32)
        if not size:
            raise _damaged(path, f"{name} without values")
        # llama-quantize takes the values as they are where no calls are given.
        entries[name] = Importance(sums.reshape(1, -1), np.array([max(calls, 1)], np.float32))
    # Files of the first versions end here.
    chunks = integer() if position < len(data) else 0
    dataset = take(integer()).decode("utf-8", "replace") if position < len(data) else ""
    return Imatrix(entries, (dataset,) if dataset else (), max(chunks, 0), _LEGACY_CHUNK_SIZE)


def _damaged(path: Path, found: str) -> ImatrixError:
    return ImatrixError(
        str(path), found=found, expected="an importance matrix of llama-imatrix (.gguf or .dat)",
        remedy="Check --imatrix, or make the file again.",
    )  # fmt: skip


def _useless(name: str, found: str) -> ImatrixError:
    return ImatrixError(
        f"imatrix entry {name}", found=found, expected="finite sums of squares over at least one input",
        remedy="Make the importance matrix again, from text that reaches every layer.",
    )  # fmt: skip
