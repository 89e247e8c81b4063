"""What a plan says about the importance matrix of a GGUF file, before the matrix itself need be known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from exporter.backends.gguf.file_types import FLOAT_TYPES, FileType, has_importance, requires_importance
from exporter.backends.gguf.header import Value
from exporter.backends.gguf.imatrix.file import (
    Imatrix,
    ImatrixError,
    Importance,
    check_fit,
    imatrix_bytes,
    imatrix_nbytes,
    read_imatrix,
)
from exporter.backends.output_plan import OutputPlan, TensorPlan
from exporter.errors import RecipeError

# Quantizers that weigh nothing: their bytes are the same with and without an importance.
_INDIFFERENT = (*FLOAT_TYPES, "Q8_0")


@dataclass(frozen=True)
class MeasuredImatrix:
    """An importance matrix that is yet to be measured, on the way through the model.

    Attributes:
        dataset: what the tokens are; a name, not a path.
        chunks: number of windows; 0 leaves it out of the file's header.
        chunk_size: tokens in one.
    """

    dataset: str = ""
    chunks: int = 0
    chunk_size: int = 0


@dataclass(frozen=True)
class ImatrixPlan:
    """The importance matrix that a GGUF file is quantized with.

    Attributes:
        file: name under which it is saved beside the artifact.
        shapes: its entries by GGUF tensor name: groups and columns.
        datasets: what the tokens were; no paths.
        chunks: number of windows, 0 if unknown.
        chunk_size: tokens in one.
        entries: its entries, or None while they are yet to be measured.
    """

    file: str
    shapes: Mapping[str, tuple[int, int]]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    entries: Mapping[str, Importance] | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of the saved file."""
        return imatrix_nbytes(self.shapes, self.datasets, self.chunks, self.chunk_size)

    def content(self, entries: Mapping[str, Importance]) -> bytes:
        """The file to save, with entries of the planned names and shapes."""
        return imatrix_bytes(entries, self.datasets, self.chunks, self.chunk_size)

    def metadata(self) -> dict[str, Value]:
        """What llama-quantize adds to the header; its `file` and `dataset` are paths, ours are names."""
        found = {"file": Value("string", self.file)}
        if self.datasets:
            found["dataset"] = Value("string", self.datasets[0])
        found["entries_count"] = Value("uint32", len(self.shapes))
        if self.chunks > 0:
            found["chunks_count"] = Value("uint32", self.chunks)
        return {f"quantize.imatrix.{key}": value for key, value in found.items()}


@dataclass(frozen=True)
class GgufPlan(OutputPlan):
    """The plan of a GGUF file.

    Attributes:
        imatrix: its importance matrix, if it has one.
    """

    imatrix: ImatrixPlan | None = None


def imatrix_source(option: object) -> Imatrix | MeasuredImatrix | None:
    """What the option `imatrix` asks for: `none`, `auto`, or the path of a file.

    Raises:
        RecipeError: it is no text, or empty.
        ImatrixError: the file cannot be taken.
    """
    if not isinstance(option, str | Path) or not str(option):
        raise RecipeError(
            "--imatrix", found=repr(option)[:80], expected="auto, none, or a file of llama-imatrix",
            remedy="Leave it out for none.",
        )  # fmt: skip
    if option == "none":
        return None
    return MeasuredImatrix() if option == "auto" else read_imatrix(Path(option))


def plan_imatrix(
    source: Imatrix | MeasuredImatrix | None,
    file_type: FileType,
    shapes: Mapping[str, tuple[int, ...]],
    model_name: str,
) -> ImatrixPlan | None:
    """The importance matrix that a file of a type gets; None where it gets none or would not depend on one.

    Args:
        source: where it comes from.
        file_type: the file type.
        shapes: the model's tensors by GGUF name, outermost dimension first.
        model_name: what the saved file is called after.

    Raises:
        RecipeError: the type needs one and there is none.
        ImatrixError: it is another model's.
    """
    if source is None:
        if file_type.needs_imatrix:
            raise RecipeError(
                f"gguf type {file_type.name}",
                found="no importance matrix",
                expected="one: without it such few bits lose too much",
                remedy="Give --imatrix auto or a file of llama-imatrix, or choose a type that does without, as Q3_K_M.",
            )
        return None
    if isinstance(source, Imatrix):
        # A matrix of another model is refused for every type, or it would depend on the order of types.
        check_fit(source.entries, shapes)
    if file_type.default in _INDIFFERENT:
        return None
    file = f"{model_name}.imatrix.gguf"
    if isinstance(source, Imatrix):
        groups = {name: (len(entry.counts), entry.in_sum2.shape[1]) for name, entry in source.entries.items()}
        datasets = tuple(map(_base_name, source.datasets))
        return ImatrixPlan(file, groups, datasets, source.chunks, source.chunk_size, source.entries)
    covered = {name: (prod(shape[:-2]), shape[-1]) for name, shape in shapes.items() if has_importance(name)}
    datasets = (_base_name(source.dataset),) if source.dataset else ()
    return ImatrixPlan(file, covered, datasets, source.chunks, source.chunk_size)


def imatrix_notes(
    source: Imatrix | MeasuredImatrix | None,
    planned: ImatrixPlan | None,
    tensors: Sequence[TensorPlan],
    file_type: FileType,
) -> list[str]:
    """What the reader should know: tensors and experts without an importance.

    Raises:
        ImatrixError: a tensor is of a type that requires an importance and has none, as in llama-quantize.
    """
    if planned is None:
        return [f"{file_type.name} does not depend on an importance matrix: none is used"] if source else []
    missing = [tensor for tensor in tensors if tensor.name not in planned.shapes]
    for tensor in missing:
        if requires_importance(tensor.name, tensor.type, file_type):
            raise ImatrixError(
                f"imatrix entry {tensor.name}", found="none", expected=f"one, for {tensor.type} requires it",
                remedy="Make the importance matrix from this model, all of it.",
            )  # fmt: skip
    notes = []
    if planned.entries is None:
        notes.append(f"the importance matrix is measured on the calibration tokens and saved as {planned.file}")
    lacking = [tensor.name for tensor in missing if has_importance(tensor.name) and tensor.type not in _INDIFFERENT]
    if lacking:
        notes.append(f"{len(lacking)} matrices have no importance, the first of them {lacking[0]}")
    unseen = {name: entry.unseen for name, entry in (planned.entries or {}).items() if entry.unseen}
    if unseen:
        first = next(iter(unseen))
        notes.append(
            f"{sum(unseen.values())} experts of {len(unseen)} tensors saw no token, the first of them in {first}: "
            "their columns count alike"
        )
    return notes


def _base_name(text: str) -> str:
    """The last part of a path of any system; llama-imatrix notes the path that it was given."""
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
