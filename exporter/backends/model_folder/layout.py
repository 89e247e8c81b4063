"""Model folders of safetensors shards: what the backends that write one have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from exporter.artifact.durable import json_document
from exporter.backends.model_folder.documents_check import UNREAD
from exporter.backends.output_plan import FilePlan, TensorPlan
from exporter.backends.pieces import whole
from exporter.errors import RecipeError
from exporter.inputs.checkpoint import INDEX_NAME, SINGLE_NAME
from exporter.merge.model import MergedModel, MergedTensor
from exporter.tokens.end_tokens import GENERATION_CONFIG, generation_document, stop_tokens

TORCH_NAMES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
ELEMENT_BYTES: Mapping[str, int] = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2}
DEFAULT_MAX_SHARD_BYTES = 5 * 1000**3

# Small files that a model folder may need beside weights and tokenizer.
_CARRIED = (GENERATION_CONFIG, "preprocessor_config.json", "LICENSE", "LICENSE.txt")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Entry:
    """One tensor to store.

    Attributes:
        name: its name in the folder.
        source: the merged tensor that it is made from.
        shape: its dimensions, outermost first.
        dtype: as safetensors calls it.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return (self.shape[-1] if self.shape else 1) * ELEMENT_BYTES[self.dtype]


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text such as `5GB` or `512MiB`.

    Raises:
        RecipeError: it cannot be read, or is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", str(size).upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(
            "max_shard_size", found=repr(size), expected="a size such as 5GB or 512MiB", remedy="Correct the size."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def in_base_order(model: MergedModel) -> list[MergedTensor]:
    """The base's own order; a head that the merge had to untie comes last."""
    rank = {name: index for index, name in enumerate(model.base.tensors)}
    return sorted(model.tensors, key=lambda tensor: rank.get(tensor.name, len(rank)))


def lay_out(entries: Iterable[Entry], limit: int) -> tuple[tuple[FilePlan, ...], tuple[TensorPlan, ...]]:
    """Shards and where each tensor lies in them.

    Args:
        entries: what to store; shards are filled in this order.
        limit: bytes of a shard; a tensor that is larger gets one of its own.
    """
    shards = _shards(entries, limit)
    files, tensors = [], []
    for name, shard in zip(_shard_names(len(shards)), shards, strict=True):
        placed, header = _lay_out_shard(shard, name)
        end = placed[-1].offset + placed[-1].nbytes if placed else len(header)
        files.append(FilePlan(name, end, header))
        tensors.extend(placed)
    return tuple(files), tuple(tensors)


def config_document(model: MergedModel, dtype: str, more: Mapping[str, Any] | None = None) -> bytes:
    """The base's configuration with the dtype, and the tying if the merge undid it, brought up to date.

    Args:
        model: the merged model.
        dtype: what most of it is stored in, as safetensors calls it.
        more: further keys.
    """
    config = {key: value for key, value in model.config.items() if not key.startswith(UNREAD)}
    for key in {"torch_dtype", "dtype"} & config.keys() or {"dtype"}:
        config[key] = TORCH_NAMES[dtype]
    return json_document(config | dict(more or {}))


def documents_of(
    model: MergedModel, tensors: tuple[TensorPlan, ...], dtype: str, more: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Configuration, the index if there are several shards, and generation settings where the base's would not stop on
    every token that ends an answer; see `config_document`.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
    """
    documents = {"config.json": config_document(model, dtype, more)}
    if len({tensor.file for tensor in tensors}) > 1:
        index = {
            "metadata": {"total_parameters": model.parameters, "total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: tensor.file for tensor in tensors},
        }
        documents[INDEX_NAME] = json_document(index)
    if (generation := generation_document(model)) is not None:
        documents[GENERATION_CONFIG] = json_document(generation)
    return documents


def copies_of(model: MergedModel) -> dict[str, Path]:
    """Files that are taken over as they are: tokenizer, chat template, generation settings unless `documents_of` has
    them."""
    carried = {name: model.base.folder / name for name in _CARRIED if (model.base.folder / name).is_file()}
    if not stop_tokens(model).agree:
        carried.pop(GENERATION_CONFIG, None)
    return carried | dict(model.tokenizer.files)


def _shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _lay_out_shard(shard: list[Entry], file: str) -> tuple[list[TensorPlan], bytes]:
    """Offsets and header of one shard. The header is padded so that the data starts aligned to 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Wider dtypes first, so that every tensor is aligned to its elements; within a width the order stays.
    shard = sorted(shard, key=lambda entry: -ELEMENT_BYTES[entry.dtype])
    for entry in shard:
        offsets = [position, position + entry.nbytes]
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    packed = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)
    header = len(packed).to_bytes(8, "little") + packed
    placed = [
        TensorPlan(
            entry.name,
            whole(entry.source),
            entry.shape,
            entry.dtype,
            file,
            len(header) + fields[entry.name]["data_offsets"][0],
            entry.row_bytes,
        )
        for entry in shard
    ]
    return placed, header
