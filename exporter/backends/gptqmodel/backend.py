"""GPTQModel as a backend: for what our own solver does not do, and to compare it with.

It quantizes a model folder, so the merge is written to one first, rounded to bf16; our own GPTQ backend
quantizes the float32 merge. It is run once every tensor is there, in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from exporter.backends.base import Backend, Writer
from exporter.backends.gptq.backend import GptqBackend
from exporter.backends.gptq.limits import LIMITS
from exporter.backends.gptq.names import QUANTS, bits_tags, quant_name
from exporter.backends.gptq.options import Scheme, bits_and_group
from exporter.backends.gptq.plan import is_quantized
from exporter.backends.gptq.vllm_rules import check_servable, notes_of, packed_kinds, runtimes_of, vllm_refusals
from exporter.backends.gptqmodel.plan import GptqModelPlan
from exporter.backends.model_folder.layout import DEFAULT_MAX_SHARD_BYTES, parse_size
from exporter.backends.output_plan import Needs, OutputPlan, TensorPlan
from exporter.backends.pieces import whole
from exporter.backends.safetensors.backend import SafetensorsBackend
from exporter.backends.type_limits import TypeLimits
from exporter.backends.weight_reader import WeightReader
from exporter.errors import RecipeError, UnsupportedModelError
from exporter.inputs.checkpoint import DTYPE_BYTES, SINGLE_NAME
from exporter.libraries import gptqmodel
from exporter.merge.model import MergedModel, MergedTensor
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.tokens.end_tokens import GENERATION_CONFIG

DEFAULT_DAMP = 0.05
# Of the header, for each stored tensor; the true one is known when it is written.
_HEADER_BYTES = 128
# Of `quantization_config`, likewise.
_CONFIG_BYTES = 2000


class GptqModelBackend(Backend):
    """Writes a folder of packed weights with GPTQModel."""

    name: ClassVar[str] = "gptqmodel"
    summary: ClassVar[str] = "GPTQ by GPTQModel, from the merge rounded to bf16, for vLLM and transformers"
    quants: ClassVar[tuple[str, ...]] = QUANTS
    needs: ClassVar[Needs] = "tokens"
    packages: ClassVar[tuple[str, ...]] = gptqmodel.PACKAGES
    limits: ClassVar[Mapping[str, TypeLimits]] = LIMITS

    def default_quant(self, model: MergedModel) -> str:
        """As our own GPTQ backend."""
        return GptqBackend().default_quant(model)

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any], *, verified: bool = False) -> OutputPlan:
        """See `Backend`.

        Sizes are those of the packed layout; names and headers of the files are GPTQModel's, so they may differ from
        the plan's: `Writer.finish` tells them. The merged folder counts as temporary.

        Options: `desc_act` (false), `sym` (true), `damp` (0.05), `max_shard_size` (5GB), `force_unservable` (false).

        Raises:
            RecipeError: gptqmodel is not installed, or an option is unknown or cannot be read.
            UnknownQuantizationError: no such type.
            UnsupportedModelError: a matrix does not fit the group size, or there is none to quantize.
            UnservableError: no server takes the result.
        """
        del verified
        if missing := gptqmodel.missing_packages():
            raise RecipeError(
                "format gptqmodel", found=f"no {' and no '.join(missing)}", expected="GPTQModel, which does the work",
                remedy=f"{gptqmodel.INSTALL}, or choose another format.",
            )  # fmt: skip
        bits, group_size = bits_and_group(quant)
        settings = _settings(bits, group_size, options)
        _check_shapes(model, bits, group_size)
        scheme = Scheme(bits, group_size, settings["sym"], settings["desc_act"], settings["damp_percent"])
        schemes = {tensor.name: scheme for tensor in model.tensors if is_quantized(tensor)}
        packed = packed_kinds(schemes)
        refusals = vllm_refusals(model, schemes, scheme)
        forced = _flag("force_unservable", options.get("force_unservable", False))
        check_servable(f"gptqmodel {quant_name(bits, group_size)}", refusals, force=forced)
        # GPTQModel loads float32 and float16 as bf16 as well: rounded once, here, and the configuration says so.
        merged = SafetensorsBackend().plan(model, "bf16", {})
        types = {tensor.name: tensor.type for tensor in merged.tensors}
        tensors = tuple(_estimate(tensor, types[tensor.name], bits, group_size) for tensor in model.tensors)
        return GptqModelPlan(
            format=self.name,
            quant=quant_name(bits, group_size),
            entry=".",
            files=(),
            tensors=tensors,
            # Where the sources of stop tokens disagree, this file is not the base's.
            documents={name: text for name, text in merged.documents.items() if name == GENERATION_CONFIG},
            copies=merged.copies,
            runtimes=runtimes_of(refusals, packed),
            packed=packed,
            notes=(*_notes(merged), *notes_of(refusals, packed)),
            needs=self.needs,
            made={
                SINGLE_NAME: _file_bytes(tensors),
                "config.json": len(merged.documents["config.json"]) + _CONFIG_BYTES,
            },
            temporary_bytes=merged.nbytes,
            merged=merged,
            quantize=settings,
            max_shard_bytes=parse_size(options.get("max_shard_size", DEFAULT_MAX_SHARD_BYTES)),
        )

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """See `Backend`. The merged folder lies beside the artifact's, in `scratch`, and goes when it is not needed."""
        from exporter.backends.gptqmodel.writer import GptqModelWriter

        if not isinstance(plan, GptqModelPlan):
            raise TypeError(f"{type(plan).__name__} is not a plan of this backend")
        return GptqModelWriter(plan, folder, folder.parent / "scratch" / f"gptqmodel-{plan.quant}", resume=resume)

    def read(self, model: MergedModel, quant: str, entry: Path) -> WeightReader:
        """See `Backend`."""
        from exporter.backends.gptq.weight_reader import GptqReader

        return GptqReader(model, quant, entry, own_scales=False)

    def tags(self, quant: str) -> tuple[str, ...]:
        """See `Backend`: `4-bit` is what the Hub calls it."""
        return bits_tags(quant)

    def packed_weights(self, entry: Path) -> frozenset[PackedWeights]:
        """See `Backend`."""
        from exporter.backends.gptq.recognize import packed_weights

        return packed_weights(entry)


def _estimate(tensor: MergedTensor, dtype: str, bits: int, group_size: int) -> TensorPlan:
    """A merged tensor with the bytes of what it becomes: codes, and for each group a float16 scale and a zero point."""
    columns = tensor.source.columns
    if is_quantized(tensor):
        groups = 1 if group_size == -1 else columns // group_size
        kind, row_bytes = f"INT{bits}", math.ceil(columns * bits / 8 + groups * (2 + bits / 8))
    else:
        kind, row_bytes = dtype, columns * DTYPE_BYTES[dtype]
    return TensorPlan(tensor.name, whole(tensor.name), tensor.shape, kind, SINGLE_NAME, 0, row_bytes)


def _file_bytes(tensors: tuple[TensorPlan, ...]) -> int:
    """Bytes of a file with these tensors; a packed one is four, and has a group's number for each column."""
    packed = [tensor for tensor in tensors if tensor.type.startswith("INT")]
    header = _HEADER_BYTES * (len(tensors) + 3 * len(packed))
    return sum(tensor.nbytes for tensor in tensors) + sum(4 * tensor.columns for tensor in packed) + header


def _check_shapes(model: MergedModel, bits: int, group_size: int) -> None:
    """Whole groups in every row, and whole words of codes and zero points."""
    matrices = [tensor for tensor in model.tensors if is_quantized(tensor)]
    if not matrices:
        raise UnsupportedModelError(
            "model", found="no matrices named …layers.N.…_proj.weight", expected="decoder layers of a Qwen",
            remedy="Choose another format.",
        )  # fmt: skip
    for tensor in matrices:
        out_features, in_features = tensor.shape
        if in_features % 32 or out_features % 32 or (group_size > 0 and in_features % group_size):
            raise UnsupportedModelError(
                tensor.name,
                found=f"shape ({out_features}, {in_features})",
                expected=f"in features a multiple of {max(group_size, 32)}, out features of 32",
                remedy="Choose smaller groups, such as " + quant_name(bits, 32) + ", or another format.",
            )


def _settings(bits: int, group_size: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of GPTQModel's QuantizeConfig."""
    known = ("desc_act", "sym", "damp", "max_shard_size", "force_unservable")
    if unknown := options.keys() - set(known):
        raise RecipeError(
            f"gptqmodel options {sorted(unknown)}", found="unknown", expected=", ".join(known), remedy="Leave them out."
        )
    try:
        damp = float(options.get("damp", DEFAULT_DAMP))
    except (TypeError, ValueError):
        damp = math.nan
    if not 0 < damp < 1:
        raise RecipeError(
            "damp", found=repr(options["damp"]), expected="a number between 0 and 1", remedy="Correct the option."
        )
    return {
        "bits": bits,
        "group_size": group_size,
        "desc_act": _flag("desc_act", options.get("desc_act", False)),
        "sym": _flag("sym", options.get("sym", True)),
        "damp_percent": damp,
    }


def _flag(name: str, value: Any) -> bool:
    flags = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (text := str(value).lower()) not in flags:
        raise RecipeError(name, found=repr(value), expected="true or false", remedy="Correct the option.")
    return flags[text]


def _notes(merged: OutputPlan) -> tuple[str, ...]:
    return (
        f"GPTQModel quantizes a merged folder in {merged.quant}, {merged.nbytes / 1e9:.2f} GB that are removed again: "
        "rounding to bf16 loses some of a small delta",
        "sizes are estimates: GPTQModel writes the files",
        "modules that see less than 0.5% of the calibration are rounded to nearest, by GPTQModel's default",
    )
