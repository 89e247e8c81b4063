"""GGUF for llama.cpp: header, types by llama.cpp's rules, and ggml's own quantizer on the float32 merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from exporter.backends.base import Backend, Writer
from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS
from exporter.backends.gguf.encoder import make_encoder
from exporter.backends.gguf.file_types import FILE_TYPES, FileType, ModelShape, row_bytes, tensor_type
from exporter.backends.gguf.header import TensorInfo, Value, pack_header, pad
from exporter.backends.gguf.imatrix.file import Floats, Imatrix
from exporter.backends.gguf.imatrix.plan import (
    GgufPlan,
    ImatrixPlan,
    MeasuredImatrix,
    imatrix_notes,
    imatrix_source,
    plan_imatrix,
)
from exporter.backends.gguf.limits import LIMITS, QUANTIZE_RATES
from exporter.backends.gguf.ollama.modelfile import MODELFILE, modelfile
from exporter.backends.gguf.tensor_names import GgufTensor, family_of, model_shape, named_tensors
from exporter.backends.output_plan import FilePlan, Needs, OutputPlan, TensorPlan
from exporter.backends.recognized import Recognized
from exporter.backends.type_limits import TypeLimits
from exporter.backends.weight_reader import WeightReader
from exporter.errors import RecipeError, UnknownQuantizationError
from exporter.families.base import Family
from exporter.merge.model import MergedModel


class GgufBackend(Backend):
    """Writes one GGUF file a quantization type."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "one file for llama.cpp, Ollama and LM Studio"
    quants: ClassVar[tuple[str, ...]] = tuple(FILE_TYPES)
    needs: ClassVar[Needs] = "moments"
    packages: ClassVar[tuple[str, ...]] = ("gguf", "llama-cpp-python")
    limits: ClassVar[Mapping[str, TypeLimits]] = LIMITS
    quantize_rates: ClassVar[Mapping[str, float]] = QUANTIZE_RATES
    always_quantized: ClassVar[bool] = True

    def default_quant(self, model: MergedModel) -> str:
        """Q4_K_M, the usual compromise of size and quality."""
        del model
        return "Q4_K_M"

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any], *, verified: bool = False) -> OutputPlan:
        """See `Backend`.

        The option `imatrix` is `auto` (measured on the tour), `none`, or the path of a file that llama-imatrix wrote.
        Without it, types that need an importance matrix get a measured one, and so do K-quants that are verified.

        Raises:
            RecipeError: an unknown option, or a type that needs an importance matrix and gets none.
            ImatrixError: the importance matrix cannot be read, or is another model's.
            UnknownQuantizationError: no such type.
            UnsupportedModelError: the model is of no family that is known here.
            MissingTensorError, UnexpectedTensorError: tensors and configuration disagree.
            TokenizerError: llama.cpp could not tokenize like the model.
        """
        if unknown := sorted(options.keys() - {"imatrix"}):
            raise RecipeError(
                f"gguf options {unknown}", found="options", expected="imatrix alone", remedy="Leave them out."
            )
        wanted = options.get("imatrix", _default_imatrix(quant, verified=verified))
        return plan_file(model, quant, imatrix_source(wanted))

    def share(self, artifacts: tuple[OutputPlan, ...]) -> tuple[OutputPlan, ...]:
        """See `Backend`: each of several files has a Modelfile of its own."""
        if len(artifacts) == 1:
            return artifacts
        return tuple(
            replace(
                artifact,
                documents={
                    f"{name}.{artifact.quant}" if name == MODELFILE else name: content
                    for name, content in artifact.documents.items()
                },
            )
            for artifact in artifacts
        )

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """See `Backend`."""
        imatrix = plan.imatrix if isinstance(plan, GgufPlan) else None
        if imatrix is not None and imatrix.entries is None and isinstance(plan, GgufPlan):
            from exporter.backends.gguf.writer import MeasuringWriter

            return MeasuringWriter(plan, imatrix, folder, resume=resume)
        entries = imatrix.entries if imatrix and imatrix.entries else {}
        return open_file(plan, folder, {name: entry.mean() for name, entry in entries.items()}, resume=resume)

    def read(self, model: MergedModel, quant: str, entry: Path) -> WeightReader:
        """See `Backend`."""
        from exporter.backends.gguf.weight_reader import GgufReader

        family = family_of(model)
        return GgufReader(entry, quant, named_tensors(model, family), model_shape(model, family), model, family)

    def recognize(self, path: Path) -> Recognized | None:
        """See `Backend`: any file, by its header."""
        from exporter.backends.gguf.recognize import recognize_file

        return recognize_file(path)

    def tags(self, quant: str) -> tuple[str, ...]:
        """See `Backend`: the program that takes the file."""
        del quant
        return ("llama.cpp",)


def _default_imatrix(quant: str, *, verified: bool) -> str:
    """Verification has the trained model walked anyway; a few more tokens make every K-quant better."""
    file_type = FILE_TYPES.get(quant.upper())
    if file_type is None:
        return "none"
    k_quant = file_type.default.startswith("Q") and file_type.default.endswith("_K")
    return "auto" if file_type.needs_imatrix or (k_quant and verified) else "none"


def plan_file(model: MergedModel, quant: str, source: Imatrix | MeasuredImatrix | None) -> GgufPlan:
    """The plan of one file; see `GgufBackend.plan`.

    Args:
        model: the merged model.
        quant: name of the file type, in any case.
        source: where its importance matrix comes from.
    """
    file_type = FILE_TYPES.get(quant.upper())
    if file_type is None:
        raise UnknownQuantizationError(
            f"gguf type {quant!r}", found="no such type", expected="one of " + " ".join(FILE_TYPES),
            remedy="See `exporter formats`.",
        )  # fmt: skip
    family = family_of(model)
    named = named_tensors(model, family)
    imatrix = plan_imatrix(source, file_type, {tensor.name: tensor.shape for tensor in named}, model.name)
    file = f"{model.name}-{file_type.name}.gguf"
    tensors = _place(named, file_type, model_shape(model, family), file, imatrix=imatrix is not None)
    header = _header(model, family, file_type, tensors, imatrix.metadata() if imatrix else {})
    end = pad(tensors[-1].offset + tensors[-1].nbytes) if tensors else 0
    placed = tuple(_shifted(tensor, len(header)) for tensor in tensors)
    measured = imatrix is not None and imatrix.entries is None
    ollama = modelfile(model)
    return GgufPlan(
        format=GgufBackend.name,
        quant=file_type.name,
        entry=file,
        files=(FilePlan(file, len(header) + end, header),),
        tensors=placed,
        documents={MODELFILE: ollama.content(file)} | _documents(imatrix),
        runtimes=("llamacpp",),
        notes=(
            *_notes(placed, file_type, model),
            *imatrix_notes(source, imatrix, placed, file_type),
            *ollama.notes,
        ),
        imatrix=imatrix,
        needs="moments" if measured else "nothing",
        calibrated=frozenset(source for tensor in placed if tensor.name in imatrix.shapes for source in tensor.sources)
        if imatrix and measured
        else frozenset(),
        made={imatrix.file: imatrix.nbytes} if imatrix and measured else {},
    )


def open_file(plan: OutputPlan, folder: Path, importance: Mapping[str, Floats], *, resume: bool) -> Writer:
    """Open a planned file for writing.

    Args:
        plan: the plan.
        folder: where its file goes.
        importance: by GGUF tensor name, float32 [columns] (experts one after the other). What the plan's importance
            matrix has an entry for must be there.
        resume: keep what is in the file.
    """
    from exporter.backends.gguf.writer import GgufWriter

    planned = plan.imatrix.shapes if isinstance(plan, GgufPlan) and plan.imatrix else ()
    return GgufWriter(plan, folder, make_encoder(importance, planned), resume=resume)


def _documents(imatrix: ImatrixPlan | None) -> dict[str, bytes]:
    """The importance matrix, where it is known by now."""
    return {imatrix.file: imatrix.content(imatrix.entries)} if imatrix and imatrix.entries is not None else {}


def _place(
    named: list[GgufTensor], file_type: FileType, shape: ModelShape, file: str, *, imatrix: bool
) -> list[TensorPlan]:
    """Types and offsets from the start of the data, in model order."""
    placed: list[TensorPlan] = []
    offset = 0
    for tensor in named:
        kind, wanted = tensor_type(tensor.name, tensor.shape, file_type, shape, imatrix=imatrix)
        size = row_bytes(kind, tensor.shape[-1])
        plan = TensorPlan(
            tensor.name, tensor.pieces, tensor.shape, kind, file, offset, size, wanted, tensor.arrangement
        )
        placed.append(plan)
        offset = pad(offset + plan.nbytes)
    return placed


def _shifted(tensor: TensorPlan, by: int) -> TensorPlan:
    return replace(tensor, offset=tensor.offset + by)


def _header(
    model: MergedModel, family: Family, file_type: FileType, tensors: list[TensorPlan], imatrix: Mapping[str, Value]
) -> bytes:
    from exporter.backends.gguf.metadata.model_keys import ParameterCount, model_metadata
    from exporter.backends.gguf.metadata.tokenizer_keys import end_of_turn_metadata, vocabulary_metadata

    metadata = model_metadata(model, family, file_type, ParameterCount.of(tensors))
    metadata |= vocabulary_metadata(model.tokenizer, model.config)
    metadata |= end_of_turn_metadata(model)
    metadata |= imatrix
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
