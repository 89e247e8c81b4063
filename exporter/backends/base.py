"""The base classes of a backend and its writer: plan what will be written, take the merged rows as they come, close.

A backend is a class registered in the entry-point group `exporter.backends`. Its module must import quickly (no torch):
heavy imports belong inside `open`. Plans are data, so they can be printed, compared and written to the manifest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from exporter.backends.output_plan import Needs, OutputPlan, TensorPlan
from exporter.backends.pieces import Piece

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from exporter.backends.hessian import Moments
    from exporter.backends.recognized import Recognized
    from exporter.backends.type_limits import TypeLimits
    from exporter.backends.weight_reader import WeightReader
    from exporter.merge.model import MergedModel
    from exporter.runtimes.artifact_facts import PackedWeights
    from exporter.tokens.windows import CalibrationWindows


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
        checksum: of the values that a server will compute with (`exporter.backends.writing.checksums`), taken before
            they were packed; None if the solver takes none.
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
class FinishedFiles:
    """What a writer made at the end.

    Attributes:
        names: of the files, relative to the output folder.
        notes: what the reader should know, and could not before.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Writer(ABC):
    """Writes one artifact.

    Every writer has `write`, `sync` and `close`. The other methods are for formats that need them: the base class does
    nothing in them.
    """

    @abstractmethod
    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None:
        """Store rows from `first_row` on. Called from several threads at once, for different rows.

        Args:
            tensor: one of the plan's tensors.
            first_row: index of the block's first row.
            block: float32, shape (rows, columns), on the merging device; it must not be changed or kept.
        """

    @abstractmethod
    def sync(self) -> None:
        """Bring everything written so far to the disk."""

    @abstractmethod
    def close(self) -> None:
        """Finish and close every file."""

    def place(self, device: str, threads: int) -> None:
        """Compute there. Called once, before the first tensor; for a writer that computes something by itself.

        Args:
            device: `cpu`, `cuda` or `cuda:N`.
            threads: worker threads.
        """
        del device, threads

    def observe(self, tensor: TensorPlan, piece: Piece, sums: npt.NDArray[np.float64], tokens: int) -> None:
        """Take the second moments at the input of a matrix. Called before the matrix's rows are written.

        A plan that needs `moments` needs a writer that overrides this.

        Args:
            tensor: one of the plan's tensors.
            piece: the matrix among its pieces: one expert of a stack, say.
            sums: sum of squares by column, shape (columns,).
            tokens: number of inputs; 0 if calibration never reached it (an expert, say).
        """
        del tensor, piece, sums, tokens

    def solve(self, weights: Mapping[str, torch.Tensor], moments: Moments) -> Solution:
        """Quantize and store the matrices that share one input. Called in place of `write`.

        A plan that needs `hessians` needs a writer that overrides this.

        Args:
            weights: merged matrices by the merged tensor's name, float32, shape (out_features, in_features); they must
                not be changed.
            moments: second moments of their common input.
        """
        raise NotImplementedError

    def finish(self, calibration: CalibrationWindows | None) -> FinishedFiles:
        """Make the files that need every tensor. Called once, when every tensor is written.

        Args:
            calibration: the calibration tokens, if the artifact needs any.
        """
        del calibration
        return FinishedFiles(())

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files that were hashed as they were written, hexadecimal, by name.

        Called once, when every tensor is written. Files that are missing here are read again and hashed.
        """
        return {}

    def checksum(self, tensor: str) -> str | None:
        """Checksum of a tensor as it left the encoder (`exporter.backends.writing.checksums`); None if it has none.

        Called once, when all of its rows are written. The backend's reader must give the same bytes: see `StoredRows`
        in `exporter.backends.weight_reader`.

        Args:
            tensor: its name in the plan.
        """
        del tensor
        return None


def overrides(writer: Writer, method: Literal["observe", "solve"]) -> bool:
    """Whether a writer has a method of its own in place of the base class's, which does nothing."""
    return getattr(type(writer), method) is not getattr(Writer, method)


class Backend(ABC):
    """One format: what it can store, how it is planned, written and read back.

    Attributes:
        name: what `--format` calls it.
        summary: one line for `exporter formats`.
        quants: the quantization types it knows, in the order to list them.
        needs: the most that one of its types must be given beside the merged weights.
        packages: distributions that must be installed for it.
        limits: the default limits of the gate by type. A type without an entry has those of the gate's fallback.
        quantize_rates: elements a second and thread of encoding, by the type of a stored tensor, for estimates of time.
            A type without an entry is as quick as writing floats.
        always_quantized: whether the Hub lists every artifact with the quantized models, whatever types it stores.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    quants: ClassVar[tuple[str, ...]]
    needs: ClassVar[Needs]
    packages: ClassVar[tuple[str, ...]]
    limits: ClassVar[Mapping[str, TypeLimits]] = {}
    quantize_rates: ClassVar[Mapping[str, float]] = {}
    always_quantized: ClassVar[bool] = False

    @abstractmethod
    def default_quant(self, model: MergedModel) -> str:
        """The type used when none is asked for."""

    @abstractmethod
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

    @abstractmethod
    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        """Open the artifact's files under `folder` for writing; with `resume`, keep what is in them."""

    def share(self, artifacts: tuple[OutputPlan, ...]) -> tuple[OutputPlan, ...]:
        """Rename files that several types of one folder would both write. By default nothing is renamed.

        Args:
            artifacts: plans of one folder, one a type.
        """
        return artifacts

    def read(self, model: MergedModel, quant: str, entry: Path) -> WeightReader | None:
        """Open an artifact's weights; None if artifacts of this format cannot be read back.

        Args:
            model: the merged model that it was made from.
            quant: its type, resolved.
            entry: what a runtime loads: a file, or the folder.
        """
        del model, quant, entry
        return None

    def recognize(self, path: Path) -> Recognized | None:
        """Say what an artifact is that came without a manifest; None if it is none of this format.

        Args:
            path: a file, or a folder with a `config.json`.

        Raises:
            ArtifactError: it seems to be of this format, but does not say what it is. Other backends are asked too.
        """
        del path
        return None

    def tags(self, quant: str) -> tuple[str, ...]:
        """Tags of the model card that people search for, beside the names of format and type.

        Args:
            quant: the type, resolved.
        """
        del quant
        return ()

    def packed_weights(self, entry: Path) -> frozenset[PackedWeights]:
        """Every kind of packed weights in an artifact; empty if it has none, or if its files cannot be read.

        Args:
            entry: what a runtime loads: a file, or the folder.
        """
        del entry
        return frozenset()


@dataclass(frozen=True)
class WriteResult:
    """What the tour did for one artifact.

    Attributes:
        digests: SHA-256 of the files whose writer took it, by name.
        made: what the writer made at the end.
        findings: what became of each matrix that was solved for.
        checksums: of its tensors as they were encoded, by the merged tensor's name, as far as they were taken.
    """

    digests: Mapping[str, str]
    made: FinishedFiles
    findings: Sequence[Finding]
    checksums: Mapping[str, str]
