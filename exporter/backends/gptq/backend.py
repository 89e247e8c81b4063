"""GPTQ for vLLM: a model folder whose linear layers are packed codes, solved for on the tour."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from exporter.artifact.durable import json_document
from exporter.backends.base import Backend, Writer
from exporter.backends.gptq.limits import LIMITS
from exporter.backends.gptq.names import GROUP_SIZES, QUANTS, WORD_BITS, bits_tags, packing_multiple, quant_name
from exporter.backends.gptq.options import FEWEST_TOKENS, GptqOptions, Scheme
from exporter.backends.gptq.plan import GptqPlan, is_quantized
from exporter.backends.gptq.vllm_rules import (
    check_servable,
    module_patterns,
    notes_of,
    packed_kinds,
    runtimes_of,
    served_together,
    vllm_refusals,
)
from exporter.backends.model_folder.layout import Entry, copies_of, documents_of, in_base_order, lay_out, parse_size
from exporter.backends.output_plan import Needs, OutputPlan
from exporter.backends.recognized import Recognized
from exporter.backends.type_limits import TypeLimits
from exporter.backends.weight_reader import WeightReader
from exporter.errors import RecipeError, UnsupportedModelError
from exporter.families.roles import experts_of, module_of
from exporter.merge.model import MergedModel, MergedTensor
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.vllm.gptq import MARLIN_IN, MARLIN_OUT, on_cpu
from exporter.version import __version__


class GptqBackend(Backend):
    """Writes packed shards, index, configuration and tokenizer."""

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "a model folder of 2 to 8 bit weights for vLLM, solved for with calibration tokens"
    quants: ClassVar[tuple[str, ...]] = QUANTS
    needs: ClassVar[Needs] = "hessians"
    packages: ClassVar[tuple[str, ...]] = ("safetensors", "transformers", "peft")
    limits: ClassVar[Mapping[str, TypeLimits]] = LIMITS

    def default_quant(self, model: MergedModel) -> str:
        """4 bits in groups of 128, for which every server has its fastest kernels, or in the largest that fit."""
        columns = [tensor.shape[-1] for tensor in model.tensors if is_quantized(tensor)]
        fitting = [size for size in GROUP_SIZES if size > 0 and not any(one % size for one in columns)]
        return quant_name(4, max(fitting, default=-1))

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any], *, verified: bool = False) -> OutputPlan:
        """See `Backend`; the options are those of `GptqOptions`.

        Raises:
            UnknownQuantizationError: no such type.
            RecipeError: an option is unknown or has a value that it cannot have; an override that matches nothing, or
                that treats matrices differently that vLLM makes one of.
            UnsupportedModelError: a matrix does not fill whole groups or words.
            UnservableError: no server takes the result.
        """
        del verified
        settings = GptqOptions.read(options)
        scheme = settings.scheme(quant)
        limit = parse_size(settings.max_shard_size)
        schemes = _schemes(model, settings, scheme)
        for tensor in model.tensors:
            if tensor.name in schemes:
                _check_shape(tensor, schemes[tensor.name])
        refusals = vllm_refusals(model, schemes, scheme, settings.checkpoint_format)
        name = quant_name(scheme.bits, scheme.group_size)
        check_servable(f"gptq {name}", refusals, force=settings.force_unservable)
        dtype = _float_dtype(model)
        files, tensors = lay_out(_entries(model, schemes, dtype), limit)
        packed = packed_kinds(schemes)
        quantization = _quantization_config(schemes, scheme, settings, model)
        documents = documents_of(model, tensors, dtype, {"quantization_config": quantization})
        # The older readers look for this one.
        documents["quantize_config.json"] = json_document(quantization)
        return GptqPlan(
            format=self.name,
            quant=name,
            entry=".",
            files=files,
            tensors=tensors,
            documents=documents,
            copies=copies_of(model),
            runtimes=runtimes_of(refusals, packed, mixed="dynamic" in quantization),
            packed=packed,
            notes=_notes(model, schemes, refusals, mixed="dynamic" in quantization),
            needs="hessians",
            calibrated=frozenset(schemes),
            sequential=settings.true_sequential,
            fewest_tokens=FEWEST_TOKENS,
            schemes=schemes,
            checkpoint_format=settings.checkpoint_format,
        )

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """See `Backend`."""
        from exporter.backends.gptq.writer import GptqWriter

        if not isinstance(plan, GptqPlan):
            raise TypeError(f"{type(plan).__name__} is not a plan of this backend")
        return GptqWriter(plan, folder, resume=resume)

    def read(self, model: MergedModel, quant: str, entry: Path) -> WeightReader:
        """See `Backend`."""
        from exporter.backends.gptq.weight_reader import GptqReader

        return GptqReader(model, quant, entry)

    def recognize(self, path: Path) -> Recognized | None:
        """See `Backend`: any model folder with a quantization."""
        from exporter.backends.gptq.recognize import recognize_folder

        return recognize_folder(path)

    def tags(self, quant: str) -> tuple[str, ...]:
        """See `Backend`: `4-bit` is what the Hub calls it."""
        return bits_tags(quant)

    def packed_weights(self, entry: Path) -> frozenset[PackedWeights]:
        """See `Backend`."""
        from exporter.backends.gptq.recognize import packed_weights

        return packed_weights(entry)


def _schemes(model: MergedModel, settings: GptqOptions, scheme: Scheme) -> dict[str, Scheme]:
    """How each matrix is quantized that is; embedding, head, norms and routers are not."""
    linear = [tensor.name for tensor in model.tensors if is_quantized(tensor)]
    if not linear:
        raise UnsupportedModelError(
            "model.layers", found="no linear layers", expected="q_proj and the like", remedy="Export to safetensors."
        )
    modules = [module_of(name) for name in linear]
    for pattern in settings.overrides:
        if not any(re.fullmatch(pattern, module) for module in modules):
            raise RecipeError(
                f"gptq option overrides: {pattern!r}",
                found="a pattern that matches no module",
                expected=f"one for whole names such as {modules[0]}",
                remedy="Correct the pattern.",
            )
    chosen = {name: settings.scheme_of(module, scheme) for name, module in zip(linear, modules, strict=True)}
    for group in served_together(linear):
        experts = experts_of(group[0])
        if len({chosen[name] for name in group}) > 1:
            raise RecipeError(
                f"gptq option overrides for {experts or group[0].removesuffix('.weight')}",
                found=f"settings that differ among its {len(group)} matrices"
                if experts
                else "settings that differ from those of " + ", ".join(name.split(".")[-2] for name in group[1:]),
                expected=f"the same for all of them: vLLM makes one {'layer' if experts else 'matrix'} of them",
                remedy="Let the pattern match all of them.",
            )
    found = {name: one for name, one in chosen.items() if one is not None}
    if not found:
        raise RecipeError(
            "gptq option overrides", found="every module kept in 16 bits", expected="some to quantize",
            remedy="Export to safetensors.",
        )  # fmt: skip
    return found


def _check_shape(tensor: MergedTensor, scheme: Scheme) -> None:
    rows, columns = tensor.shape
    word = packing_multiple(scheme.bits)
    width = columns if scheme.group_size == -1 else scheme.group_size
    if columns % width or columns % word or rows % word:
        raise UnsupportedModelError(
            tensor.name,
            found=f"shape {list(tensor.shape)}",
            expected=f"a multiple of {max(word, width)} columns and of {word} rows for {scheme.bits} bits",
            remedy="Choose a smaller group size, or keep the module in 16 bits by an override.",
        )


def _float_dtype(model: MergedModel) -> str:
    """What stays in 16 bits: float16 where the base is, else bfloat16, whose range any base fits."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        sizes[tensor.source.dtype] = sizes.get(tensor.source.dtype, 0) + tensor.elements
    return "F16" if max(sizes, key=lambda dtype: sizes[dtype]) == "F16" else "BF16"


def _entries(model: MergedModel, schemes: Mapping[str, Scheme], dtype: str) -> list[Entry]:
    """What is stored, in the base's order: four tensors in the place of each quantized weight."""
    entries = []
    for tensor in in_base_order(model):
        scheme = schemes.get(tensor.name)
        if scheme is None:
            entries.append(Entry(tensor.name, tensor.name, tensor.shape, dtype))
            continue
        rows, columns = tensor.shape
        groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
        module = module_of(tensor.name)
        for part, shape, kind in (
            ("qweight", (columns * scheme.bits // WORD_BITS, rows), "I32"),
            ("qzeros", (groups, rows * scheme.bits // WORD_BITS), "I32"),
            ("scales", (groups, rows), "F16"),
            ("g_idx", (columns,), "I32"),
        ):
            entries.append(Entry(f"{module}.{part}", tensor.name, shape, kind))
    return entries


def _quantization_config(
    schemes: Mapping[str, Scheme], scheme: Scheme, settings: GptqOptions, model: MergedModel
) -> dict[str, Any]:
    """As transformers, GPTQModel and vLLM read it."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
        "damp_percent": scheme.damp,
        "true_sequential": settings.true_sequential,
        "static_groups": False,
        "lm_head": False,
        "checkpoint_format": settings.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"exporter:{__version__}"]},
    }
    if dynamic := _dynamic(schemes, scheme, model):
        config["dynamic"] = dynamic
    return config


def _dynamic(schemes: Mapping[str, Scheme], scheme: Scheme, model: MergedModel) -> dict[str, dict[str, Any]]:
    """Rules for what differs, by whole names: those of the checkpoint, and what vLLM calls the ones that it fuses.

    A pattern with `+:` changes settings and one with `-:` keeps modules in 16 bits (GPTQModel's `dynamic`); both
    readers match it at the start of a name.
    """
    linear = [tensor.name for tensor in model.tensors if is_quantized(tensor)]
    rules: dict[Scheme | None, list[str]] = {}
    for group in served_together(linear):
        if schemes.get(group[0]) != scheme:
            rules.setdefault(schemes.get(group[0]), []).extend(module_patterns(group))
    return {
        ("-:" if other is None else "+:") + f"^(?:{'|'.join(patterns)})$": {} if other is None else other.rule()
        for other, patterns in rules.items()
    }


def _notes(model: MergedModel, schemes: Mapping[str, Scheme], refusals: list[str], *, mixed: bool) -> tuple[str, ...]:
    notes = []
    tensors = [tensor for tensor in model.tensors if tensor.name in schemes]
    if not refusals:
        unfit = [tensor for tensor in tensors if tensor.shape[0] % MARLIN_OUT or tensor.shape[1] % MARLIN_IN]
        notes.append(
            "vLLM serves it: on a GPU with its Marlin kernel"
            + (f" ({len(unfit)} matrices are padded or slower: not multiples of 128 by 64)" if unfit else "")
            + on_cpu(packed_kinds(schemes))
        )
    notes += notes_of(refusals, packed_kinds(schemes), mixed=mixed)
    kept = sum(1 for tensor in model.tensors if len(tensor.shape) == 2 and tensor.name not in schemes)
    packed = sum(tensor.elements for tensor in tensors)
    notes.append(
        f"{len(tensors)} matrices are packed, {packed / model.parameters:.0%} of the parameters; {kept} stay in 16 bits"
    )
    if model.untied:
        notes.append("the adapter makes head and embedding differ: tie_word_embeddings is false and lm_head is written")
    return tuple(notes)
