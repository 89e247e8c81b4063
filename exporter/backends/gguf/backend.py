"""GGUF for llama.cpp: header, types by llama.cpp's rules, and ggml's own quantizer on the float32 merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.backends.base import FilePlan, OutputPlan, TensorPlan, Writer
from exporter.backends.gguf.ggml import TYPE_NUMBERS, quantize_rows
from exporter.backends.gguf.header import TensorInfo, pack_header, pad
from exporter.backends.gguf.types import FILE_TYPES, FLOAT_TYPES, FileType, ModelShape, row_bytes, tensor_type
from exporter.errors import (
    MissingTensorError,
    RecipeError,
    UnexpectedTensorError,
    UnknownQuantizationError,
    UnsupportedModelError,
)
from exporter.families import FAMILIES, Family, find_family
from exporter.families.base import number
from exporter.model import MergedModel, MergedTensor

if TYPE_CHECKING:
    import torch

# Buffers that some checkpoints carry and every runtime recomputes; llama.cpp's converter leaves them out too.
_RECOMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


class GgufBackend:
    """Writes one GGUF file a quantization type."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "one file for llama.cpp, Ollama and LM Studio"
    quants: ClassVar[tuple[str, ...]] = tuple(FILE_TYPES)
    needs: ClassVar[str] = "nothing"
    packages: ClassVar[tuple[str, ...]] = ("gguf", "llama-cpp-python")

    def default_quant(self, model: MergedModel) -> str:
        """Q4_K_M, the usual compromise of size and quality."""
        del model
        return "Q4_K_M"

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any]) -> OutputPlan:
        """See `Backend`.

        Raises:
            UnknownQuantizationError: no such type.
            UnsupportedModelError: the model is of no family that is known here.
            MissingTensorError, UnexpectedTensorError: tensors and configuration disagree.
            TokenizerError: llama.cpp could not tokenize like the model.
        """
        if options:
            raise RecipeError(
                f"gguf options {sorted(options)}", found="options", expected="none", remedy="Leave them out."
            )
        file_type = FILE_TYPES.get(quant.upper())
        if file_type is None:
            raise UnknownQuantizationError(
                f"gguf type {quant!r}", found="no such type", expected="one of " + " ".join(FILE_TYPES),
                remedy="See `exporter formats`.",
            )  # fmt: skip
        family = _family(model)
        named = _named_tensors(model, family)
        file = f"{model.name}-{file_type.name}.gguf"
        tensors = _place(named, file_type, _model_shape(model, family), file)
        header = _header(model, family, file_type, tensors)
        end = pad(tensors[-1].offset + tensors[-1].nbytes) if tensors else 0
        placed = tuple(_shifted(tensor, len(header)) for tensor in tensors)
        return OutputPlan(
            format=self.name,
            quant=file_type.name,
            entry=file,
            files=(FilePlan(file, len(header) + end, header),),
            tensors=placed,
            runtimes=("llamacpp",),
            notes=_notes(placed, file_type, model),
        )

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """See `Backend`."""
        from exporter.backends.files import OffsetWriter

        return OffsetWriter(plan, folder, _encode, resume=resume)


def _encode(tensor: TensorPlan, block: torch.Tensor) -> bytes | bytearray | memoryview:
    from exporter.backends.files import encode_float

    if tensor.type in FLOAT_TYPES:
        return encode_float(block, tensor.type, tensor.name)
    rows = block.cpu().contiguous()
    return quantize_rows(tensor.type, rows.data_ptr(), rows.shape[0], rows.shape[1], rows.shape[0] * tensor.row_bytes)


def _family(model: MergedModel) -> Family:
    family = find_family(model.config)
    if family is None:
        raise UnsupportedModelError(
            "config.json",
            found=f"model_type {model.config.get('model_type')!r}, architectures {model.config.get('architectures')}",
            expected=" or ".join(family.architecture for family in FAMILIES),
            remedy="Export to safetensors, which takes any architecture.",
        )
    if model.config.get("attention_bias") and not family.qkv_bias:
        raise UnsupportedModelError(
            "config.json: attention_bias",
            found="true",
            expected=f"false: llama.cpp has no such biases in {family.gguf_architecture}",
            remedy="Export to safetensors.",
        )
    return family


def _named_tensors(model: MergedModel, family: Family) -> list[tuple[str, MergedTensor]]:
    """Pair every merged tensor with its GGUF name; refuse unless they are the ones the configuration calls for."""
    import gguf

    expected = family.expected_tensors(model.config)
    actual = {tensor.name: tensor for tensor in model.tensors if not tensor.name.endswith(_RECOMPUTED)}
    if model.config.get("tie_word_embeddings"):
        # Some tied checkpoints store the head again; the runtime takes the embedding.
        actual.pop("lm_head.weight", None)
    for name, shape in expected.items():
        if name not in actual or actual[name].shape != shape:
            found = f"shape {list(actual[name].shape)}" if name in actual else "no such tensor"
            raise MissingTensorError(
                name, found=found, expected=f"shape {list(shape)} by config.json", remedy="Fetch the base again."
            )
    if extra := sorted(actual.keys() - expected.keys()):
        raise UnexpectedTensorError(
            extra[0],
            found=f"a tensor that {family.architecture} does not have"
            + (f" (and {len(extra) - 1} more)" * bool(extra[1:])),
            expected="only the tensors that config.json calls for",
            remedy="Export to safetensors, which keeps every tensor.",
        )
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_architecture)
    names = gguf.get_tensor_name_map(architecture, number(model.config, "num_hidden_layers"))
    return [(names.get_name(name, try_suffixes=(".weight", ".bias")), actual[name]) for name in expected]


def _model_shape(model: MergedModel, family: Family) -> ModelShape:
    layers, heads = number(model.config, "num_hidden_layers"), number(model.config, "num_attention_heads")
    return ModelShape(
        layers=layers,
        gqa=heads // number(model.config, "num_key_value_heads", heads),
        tied=bool(model.config.get("tie_word_embeddings")),
        # llama.cpp calls Qwen2 models of 80 layers LLM_TYPE_70B (src/models/qwen2.cpp).
        bump_attn_v=family.gguf_architecture == "qwen2" and layers == 80,
    )


def _place(
    named: list[tuple[str, MergedTensor]], file_type: FileType, shape: ModelShape, file: str
) -> list[TensorPlan]:
    """Types and offsets from the start of the data, in model order."""
    placed: list[TensorPlan] = []
    offset = 0
    for name, tensor in named:
        kind, wanted = tensor_type(name, tensor.shape, file_type, shape)
        plan = TensorPlan(
            name, tensor.name, tensor.shape, kind, file, offset, row_bytes(kind, tensor.shape[-1]), wanted
        )
        placed.append(plan)
        offset = pad(offset + plan.nbytes)
    return placed


def _shifted(tensor: TensorPlan, by: int) -> TensorPlan:
    return replace(tensor, offset=tensor.offset + by)


def _header(model: MergedModel, family: Family, file_type: FileType, tensors: list[TensorPlan]) -> bytes:
    from exporter.backends.gguf.metadata import model_metadata
    from exporter.backends.gguf.vocabulary import vocabulary_metadata

    parameters = sum(tensor.rows * tensor.columns for tensor in tensors)
    metadata = model_metadata(model, family, file_type, parameters)
    metadata |= vocabulary_metadata(model.tokenizer, model.config)
    infos = [TensorInfo(tensor.name, tensor.shape, TYPE_NUMBERS[tensor.type], tensor.offset) for tensor in tensors]
    return pack_header(metadata, infos)


def _notes(tensors: tuple[TensorPlan, ...], file_type: FileType, model: MergedModel) -> tuple[str, ...]:
    notes = []
    if fallen := [tensor for tensor in tensors if tensor.fallback_from]:
        share = sum(tensor.nbytes for tensor in fallen) / sum(tensor.nbytes for tensor in tensors)
        kinds = sorted({f"{tensor.fallback_from} → {tensor.type}" for tensor in fallen})
        notes.append(
            f"{len(fallen)} tensors ({share:.0%} of the bytes) are not the type that {file_type.name} asks for, "
            f"because their rows are not a multiple of its block: {', '.join(kinds)}"
        )
    if model.untied:
        notes.append("the adapter makes head and embedding differ: the file is untied and carries output.weight")
    return tuple(notes)
