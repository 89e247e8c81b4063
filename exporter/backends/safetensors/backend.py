"""Hugging Face safetensors: a model folder that `from_pretrained` and `vllm serve` take as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.backends.base import Backend, Writer
from exporter.backends.model_folder.layout import (
    DEFAULT_MAX_SHARD_BYTES,
    Entry,
    copies_of,
    documents_of,
    in_base_order,
    lay_out,
    parse_size,
)
from exporter.backends.output_plan import Needs, OutputPlan, TensorPlan
from exporter.backends.recognized import Recognized
from exporter.backends.safetensors.limits import LIMITS
from exporter.backends.type_limits import TypeLimits
from exporter.backends.weight_reader import WeightReader
from exporter.errors import RecipeError, UnknownQuantizationError
from exporter.inputs.checkpoint import DTYPE_BYTES
from exporter.merge.model import MergedModel

if TYPE_CHECKING:
    import torch


DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


class SafetensorsBackend(Backend):
    """Writes shards, index, configuration and tokenizer."""

    name: ClassVar[str] = "safetensors"
    summary: ClassVar[str] = "a Hugging Face model folder for vLLM and transformers"
    quants: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    needs: ClassVar[Needs] = "nothing"
    packages: ClassVar[tuple[str, ...]] = ("safetensors",)
    limits: ClassVar[Mapping[str, TypeLimits]] = LIMITS

    def default_quant(self, model: MergedModel) -> str:
        """The dtype of most of the base's elements."""
        sizes: Counter[str] = Counter()
        for tensor in model.tensors:
            sizes[tensor.source.dtype] += tensor.elements
        dtype = sizes.most_common(1)[0][0]
        return next(name for name, stored in DTYPES.items() if stored == dtype)

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any], *, verified: bool = False) -> OutputPlan:
        """See `Backend`. Option `max_shard_size`: bytes, or a number with a unit such as `5GB`.

        Raises:
            UnknownQuantizationError: no such dtype.
            RecipeError: an unknown option, or a size that cannot be read.
        """
        del verified
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
        entries = [Entry(one.name, one.name, one.shape, stored[one.name]) for one in in_base_order(model)]
        files, tensors = lay_out(entries, limit)
        return OutputPlan(
            format=self.name,
            quant=quant,
            entry=".",
            files=files,
            tensors=tensors,
            documents=documents_of(model, tensors, DTYPES[quant]),
            copies=copies_of(model),
            runtimes=("vllm", "transformers"),
            notes=_notes(model, stored),
        )

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """See `Backend`."""
        from exporter.backends.writing.offset_writer import OffsetWriter

        return OffsetWriter(plan, folder, _encode, resume=resume)

    def read(self, model: MergedModel, quant: str, entry: Path) -> WeightReader:
        """See `Backend`."""
        from exporter.backends.model_folder.weight_reader import FloatReader

        return FloatReader(model, entry, _stored_dtypes(model, quant, self.default_quant(model)))

    def recognize(self, path: Path) -> Recognized | None:
        """See `Backend`: a model folder without a quantization."""
        from exporter.backends.safetensors.recognize import recognize_floats

        return recognize_floats(path, DTYPES)


def _encode(tensor: TensorPlan, block: torch.Tensor) -> memoryview:
    from exporter.backends.writing.offset_writer import encode_float

    return encode_float(block, tensor.type, tensor.name)


def _stored_dtypes(model: MergedModel, quant: str, default: str) -> dict[str, str]:
    """The dtype of each tensor. Asked for what the base mostly is, each keeps its own (a float32 router, say)."""
    return {tensor.name: tensor.source.dtype if quant == default else DTYPES[quant] for tensor in model.tensors}


def _notes(model: MergedModel, stored: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    narrowed = [t for t in model.tensors if DTYPE_BYTES[t.source.dtype] > DTYPE_BYTES[stored[t.name]]]
    if narrowed:
        notes.append(f"{len(narrowed)} tensors of the base are wider than what is stored and are rounded")
    if model.untied:
        notes.append("the adapter makes head and embedding differ: tie_word_embeddings is false and lm_head is written")
    return tuple(notes)
