"""The protocol of a backend: say what will be written, take the merged rows as they come, close.

A backend is a class registered in the entry-point group `exporter.backends`. Its module must import quickly (no torch):
heavy imports belong inside `open`. Plans are data, so they can be printed, compared and written to the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from exporter.backends.gptq.hessian import Moments
    from exporter.calibration import CalibrationWindows
    from exporter.model import MergedModel


# Merged weights alone; second moments of the inputs of some matrices; Hessians to solve for them; calibration tokens.
Needs = Literal["nothing", "moments", "hessians", "tokens"]


@dataclass(frozen=True)
class TensorPlan:
    """One stored tensor: what it is made from, its type, and where its rows go.

    Attributes:
        name: its name in the output.
        source: name of the merged tensor that it is made from.
        shape: its dimensions, outermost first.
        type: the type it is stored in, in the format's own words (`Q6_K`, `BF16`).
        file: the file it goes to, relative to the output folder.
        offset: byte in that file where it starts.
        row_bytes: bytes of one stored row.
        fallback_from: the type that the rules asked for, if its shape does not allow that one.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    file: str
    offset: int
    row_bytes: int
    fallback_from: str | None = None

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows when seen as a matrix."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class FilePlan:
    """One file that holds tensors.

    Attributes:
        name: relative to the output folder.
        nbytes: its size.
        header: the bytes it starts with.
    """

    name: str
    nbytes: int
    header: bytes = field(repr=False)


@dataclass(frozen=True)
class OutputPlan:
    """One artifact, fully described before a byte of it is written.

    Attributes:
        format: the backend's name.
        quant: the quantization type asked for, resolved (never empty).
        entry: what a runtime loads, relative to the output folder: a file, or `.` for the folder itself.
        files: the files that hold tensors.
        tensors: every stored tensor.
        documents: small files known by now: name to content.
        copies: files taken over as they are: name to source.
        runtimes: runtimes that can verify it, the preferred one first.
        packed_bits: every number of bits that any of its GPTQ weights has, for which a runtime needs more than for
            others; empty if it has none.
        packed_experts: likewise of the experts among those weights.
        notes: degradations and choices that the reader should know of.
        needs: what it must be given beside the merged weights.
        calibrated: merged tensors whose second moments are observed, or that are solved for, by what it needs.
        sequential: solve for the matrices of a layer one input after the other, each with those before it solved.
        made: files that are made at the end, once every tensor is written: name to bytes, which may be an estimate.
        temporary_bytes: what writing it takes on the disk for a while, beyond its files.
        fewest_tokens: calibration tokens without which nothing in it would be calibrated.
    """

    format: str
    quant: str
    entry: str
    files: tuple[FilePlan, ...]
    tensors: tuple[TensorPlan, ...]
    documents: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    copies: Mapping[str, Path] = field(default_factory=dict)
    runtimes: tuple[str, ...] = ()
    packed_bits: frozenset[int] = frozenset()
    packed_experts: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    needs: Needs = "nothing"
    calibrated: frozenset[str] = field(default=frozenset(), repr=False)
    sequential: bool = False
    made: Mapping[str, int] = field(default_factory=dict)
    temporary_bytes: int = 0
    fewest_tokens: int = 0

    @property
    def label(self) -> str:
        """Short name for screens and messages."""
        return f"{self.format} {self.quant}"

    @property
    def nbytes(self) -> int:
        """Bytes of everything it writes."""
        copied = sum(path.stat().st_size for path in self.copies.values())
        written = sum(file.nbytes for file in self.files) + sum(self.made.values())
        return written + sum(map(len, self.documents.values())) + copied

    def names(self, made: Iterable[str] = ()) -> list[str]:
        """All of its files, with those that were made at the end."""
        return [file.name for file in self.files] + list(self.documents) + list(self.copies) + list(made)

    @property
    def fallbacks(self) -> tuple[TensorPlan, ...]:
        """The tensors whose shape forced another type than the rules asked for."""
        return tuple(tensor for tensor in self.tensors if tensor.fallback_from)


@dataclass(frozen=True)
class Finding:
    """What became of one matrix that was solved for.

    Attributes:
        name: the merged tensor's name.
        tokens: inputs that its Hessian was taken from.
        loss: mean over its elements of the squared error, weighted with the damped Hessian.
        damp: the damping that succeeded, as a fraction of the Hessian's mean diagonal.
        attempts: factorizations of the Hessian that were tried; more than one if the damping had to be raised.
        dead: input columns that were always zero.
        rounded: whether it was rounded to nearest, because calibration saw too few inputs.
        checksum: of the values that a server will compute with (`exporter.checksums`), taken before they were packed;
            None if the solver takes none.
    """

    name: str
    tokens: int
    loss: float
    damp: float
    attempts: int
    dead: int
    rounded: bool
    checksum: str | None = None


@dataclass(frozen=True)
class Solution:
    """What became of matrices that share one input.

    Attributes:
        weights: by the merged tensor's name, the values that a server will compute with: float32, shape
            (out_features, in_features).
        findings: one a matrix.
    """

    weights: dict[str, torch.Tensor]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Made:
    """What a writer made at the end.

    Attributes:
        names: of the files, relative to the output folder.
        notes: what the reader should know, and could not before.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Writer(Protocol):
    """Writes one artifact. `write` is called from several threads at once, for different rows."""

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None:
        """Store rows from `first_row` on.

        Args:
            tensor: one of the plan's tensors.
            first_row: index of the block's first row.
            block: float32, shape (rows, columns), on the merging device; it must not be changed or kept.
        """

    def sync(self) -> None:
        """Bring everything written so far to the disk."""

    def close(self) -> None:
        """Finish and close every file."""


@runtime_checkable
class ObservingWriter(Writer, Protocol):
    """A writer of an artifact that needs second moments: it is told a tensor's before it is given its rows."""

    def observe(self, tensor: TensorPlan, sums: npt.NDArray[np.float64], tokens: int) -> None:
        """Take what was seen at the input of a matrix.

        Args:
            tensor: one of the plan's tensors.
            sums: sum of squares by column, shape (columns,).
            tokens: number of inputs; 0 if calibration never reached it (an expert, say).
        """


@runtime_checkable
class SolvingWriter(Writer, Protocol):
    """A writer of an artifact whose matrices are solved for from Hessians."""

    def solve(self, weights: Mapping[str, torch.Tensor], moments: Moments) -> Solution:
        """Quantize and store the matrices that share one input.

        Args:
            weights: merged matrices by the merged tensor's name, float32, shape (out_features, in_features); they must
                not be changed.
            moments: what was seen at their common input.
        """


@runtime_checkable
class FinishingWriter(Writer, Protocol):
    """A writer that makes some of its files once every tensor is written."""

    def finish(self, calibration: CalibrationWindows | None) -> Made:
        """Make them.

        Args:
            calibration: the calibration tokens, if the artifact needs any.
        """


@runtime_checkable
class PlacedWriter(Writer, Protocol):
    """A writer that computes something by itself: it is told where, before it is given a tensor."""

    def place(self, device: str, threads: int) -> None:
        """Compute there.

        Args:
            device: `cpu`, `cuda` or `cuda:N`.
            threads: worker threads.
        """


@runtime_checkable
class HashingWriter(Protocol):
    """A writer that hashes its files as it goes. The files of any other are read again and hashed at the end."""

    def digests(self) -> dict[str, str]:
        """SHA-256 of its files, hexadecimal, by name; called once, when every tensor is written."""


@runtime_checkable
class ChecksummingWriter(Writer, Protocol):
    """A writer that knows checksums of tensors as they left its encoder (`exporter.checksums`). Its backend's reader
    must give the same bytes: see `StoredRows` in `exporter.backends.reading`."""

    def checksum(self, tensor: str) -> str | None:
        """Of a tensor of the plan, by its name; None if it has none. Called once, when all of its rows are written."""


class Backend(Protocol):
    """What a format has to say and do.

    Attributes:
        name: what `--format` calls it.
        summary: one line for `exporter formats`.
        quants: the quantization types it knows, in the order to list them.
        needs: the most that one of its types must be given beside the merged weights.
        packages: distributions that must be installed for it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    quants: ClassVar[tuple[str, ...]]
    needs: ClassVar[Needs]
    packages: ClassVar[tuple[str, ...]]

    def default_quant(self, model: MergedModel) -> str:
        """The type used when none is asked for."""

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any], *, verified: bool = False) -> OutputPlan:
        """Describe the artifact, or refuse.

        Args:
            model: the merged model.
            quant: the quantization type, as it was asked for.
            options: the backend's own options.
            verified: whether the artifact will be verified, so that the trained model is walked in any case.

        Raises:
            RefusalError: the model cannot be written in this format or type.
        """

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """Open the artifact's files under `folder` for writing; with `resume`, keep what is in them."""


@runtime_checkable
class SharingBackend(Protocol):
    """A backend whose artifacts can lie in one folder, several types of the same model."""

    def share(self, artifacts: tuple[OutputPlan, ...]) -> tuple[OutputPlan, ...]:
        """Name apart what each of them has its own of.

        Args:
            artifacts: plans of one folder, one a type.
        """
