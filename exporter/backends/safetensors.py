"""Hugging Face safetensors: a model folder that `from_pretrained` and `vllm serve` take as it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.backends.base import FilePlan, OutputPlan, TensorPlan, Writer
from exporter.checkpoint import DTYPE_BYTES, INDEX_NAME, SINGLE_NAME
from exporter.errors import RecipeError, UnknownQuantizationError
from exporter.model import MergedModel, MergedTensor

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
TORCH_NAMES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DEFAULT_MAX_SHARD_BYTES = 5 * 1000**3

# Small files that a model folder may need beside weights and tokenizer.
_CARRIED = ("generation_config.json", "preprocessor_config.json", "LICENSE", "LICENSE.txt")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class SafetensorsBackend:
    """Writes shards, index, configuration and tokenizer."""

    name: ClassVar[str] = "safetensors"
    summary: ClassVar[str] = "a Hugging Face model folder for vLLM and transformers"
    quants: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    needs: ClassVar[str] = "nothing"
    packages: ClassVar[tuple[str, ...]] = ("safetensors",)

    def default_quant(self, model: MergedModel) -> str:
        """The dtype of most of the base's elements."""
        sizes: Counter[str] = Counter()
        for tensor in model.tensors:
            sizes[tensor.source.dtype] += tensor.elements
        dtype = sizes.most_common(1)[0][0]
        return next(name for name, stored in DTYPES.items() if stored == dtype)

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any]) -> OutputPlan:
        """See `Backend`. Option `max_shard_size`: bytes, or a number with a unit such as `5GB`.

        Raises:
            UnknownQuantizationError: no such dtype.
            RecipeError: an unknown option, or a size that cannot be read.
        """
        quant = quant.lower()
        if quant not in DTYPES:
            raise UnknownQuantizationError(
                f"safetensors type {quant!r}", found="no such type", expected="one of " + " ".join(DTYPES),
                remedy="See `exporter formats`.",
            )  # fmt: skip
        if unknown := options.keys() - {"max_shard_size"}:
            raise RecipeError(
                f"safetensors options {sorted(unknown)}",
                found="unknown",
                expected="max_shard_size",
                remedy="Leave them out.",
            )
        limit = parse_size(options.get("max_shard_size", DEFAULT_MAX_SHARD_BYTES))
        stored = _stored_dtypes(model, quant, self.default_quant(model))
        shards = _shards(_in_base_order(model), stored, limit)
        names = _shard_names(len(shards))
        files, tensors = [], []
        for name, shard in zip(names, shards, strict=True):
            placed, header = _lay_out(shard, stored, name)
            end = placed[-1].offset + placed[-1].nbytes if placed else len(header)
            files.append(FilePlan(name, end, header))
            tensors.extend(placed)
        documents = {"config.json": _config(model, quant)}
        if len(files) > 1:
            documents[INDEX_NAME] = _index(tensors, model)
        copies = {name: model.base.folder / name for name in _CARRIED if (model.base.folder / name).is_file()}
        return OutputPlan(
            format=self.name,
            quant=quant,
            entry=".",
            files=tuple(files),
            tensors=tuple(tensors),
            documents=documents,
            copies=copies | dict(model.tokenizer.files),
            runtimes=("vllm", "transformers"),
            notes=_notes(model, stored),
        )

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """See `Backend`."""
        from exporter.backends.files import OffsetWriter

        return OffsetWriter(plan, folder, _encode, resume=resume)


def _encode(tensor: TensorPlan, block: torch.Tensor) -> memoryview:
    from exporter.backends.files import encode_float

    return encode_float(block, tensor.type, tensor.name)


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


def _in_base_order(model: MergedModel) -> list[MergedTensor]:
    """The base's own order; a head that the merge had to untie comes last."""
    rank = {name: index for index, name in enumerate(model.base.tensors)}
    return sorted(model.tensors, key=lambda tensor: rank.get(tensor.name, len(rank)))


def _stored_dtypes(model: MergedModel, quant: str, default: str) -> dict[str, str]:
    """The dtype of each tensor. Asked for what the base mostly is, each keeps its own (a float32 router, say)."""
    return {tensor.name: tensor.source.dtype if quant == default else DTYPES[quant] for tensor in model.tensors}


def _shards(tensors: list[MergedTensor], stored: Mapping[str, str], limit: int) -> list[list[MergedTensor]]:
    """Fill shards in order; a tensor larger than the limit gets one of its own."""
    shards: list[list[MergedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        nbytes = tensor.elements * DTYPE_BYTES[stored[tensor.name]]
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _lay_out(shard: list[MergedTensor], stored: Mapping[str, str], file: str) -> tuple[list[TensorPlan], bytes]:
    """Offsets and header of one shard. The header is padded so that the data starts aligned to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Wider dtypes first, so that every tensor is aligned to its elements; within a dtype the order stays.
    shard = sorted(shard, key=lambda tensor: -DTYPE_BYTES[stored[tensor.name]])
    for tensor in shard:
        dtype = stored[tensor.name]
        nbytes = tensor.elements * DTYPE_BYTES[dtype]
        entries[tensor.name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    packed = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)
    header = len(packed).to_bytes(8, "little") + packed
    placed = [
        TensorPlan(
            tensor.name,
            tensor.name,
            tensor.shape,
            stored[tensor.name],
            file,
            len(header) + entries[tensor.name]["data_offsets"][0],
            tensor.source.columns * DTYPE_BYTES[stored[tensor.name]],
        )
        for tensor in shard
    ]
    return placed, header


def _config(model: MergedModel, quant: str) -> bytes:
    """The base's configuration with the dtype, and the tying if the merge undid it, brought up to date."""
    config = {key: value for key, value in model.config.items() if not key.startswith(("_name_or_path", "_model_name"))}
    for key in {"torch_dtype", "dtype"} & config.keys() or {"dtype"}:
        config[key] = TORCH_NAMES[DTYPES[quant]]
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _index(tensors: list[TensorPlan], model: MergedModel) -> bytes:
    index = {
        "metadata": {"total_parameters": model.parameters, "total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: tensor.file for tensor in tensors},
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _notes(model: MergedModel, stored: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    narrowed = [t for t in model.tensors if DTYPE_BYTES[t.source.dtype] > DTYPE_BYTES[stored[t.name]]]
    if narrowed:
        notes.append(f"{len(narrowed)} tensors of the base are wider than what is stored and are rounded")
    if model.untied:
        notes.append("the adapter makes head and embedding differ: tie_word_embeddings is false and lm_head is written")
    return tuple(notes)
