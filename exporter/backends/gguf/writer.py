"""The writer of a GGUF file whose importance matrix is measured on the tour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from exporter.artifact.durable import write_durably
from exporter.backends.base import FinishedFiles
from exporter.backends.gguf.encoder import Encoder, make_encoder
from exporter.backends.gguf.imatrix.file import Floats, Importance
from exporter.backends.gguf.imatrix.plan import GgufPlan, ImatrixPlan
from exporter.backends.output_plan import OutputPlan, TensorPlan
from exporter.backends.pieces import Piece
from exporter.backends.writing.offset_writer import OffsetWriter
from exporter.errors import BackendError
from exporter.tokens.windows import CalibrationWindows


class GgufWriter(OffsetWriter):
    """Writes one GGUF file; its encoder is told which rows it is given, as experts have importances of their own.

    Args:
        plan: the file's plan.
        folder: where it goes.
        encode: the encoder.
        resume: keep what is in the file.

    Raises:
        WriteError: the disk is full or the file cannot be made.
    """

    def __init__(self, plan: OutputPlan, folder: Path, encode: Encoder, *, resume: bool) -> None:
        self._encode_rows = encode
        super().__init__(plan, folder, lambda tensor, block: encode(tensor, 0, block), resume=resume)

    def encoded(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> bytes | bytearray | memoryview:
        """See `OffsetWriter`."""
        return self._encode_rows(tensor, first_row, block)


class MeasuringWriter(GgufWriter):
    """Quantizes each matrix with the importance that it was told before, and saves the importance matrix at the end.

    Args:
        plan: the file's plan.
        imatrix: the plan of its importance matrix.
        folder: where its files go.
        resume: keep what is in the file.

    Raises:
        WriteError: the disk is full or the file cannot be made.
    """

    def __init__(self, plan: GgufPlan, imatrix: ImatrixPlan, folder: Path, *, resume: bool) -> None:
        self._imatrix, self._folder = imatrix, folder
        self._entries: dict[str, Importance] = {}
        self._importance: dict[str, Floats] = {}
        super().__init__(plan, folder, make_encoder(self._importance, imatrix.shapes), resume=resume)

    def observe(self, tensor: TensorPlan, piece: Piece, sums: npt.NDArray[np.float64], tokens: int) -> None:
        """See `Writer`. Of a stack of experts, each has its own sums and tokens."""
        experts = len(tensor.pieces)
        if tensor.name not in self._entries:
            shape = (experts, tensor.columns)
            self._entries[tensor.name] = Importance(np.zeros(shape, np.float32), np.zeros(experts, np.float32))
            self._importance[tensor.name] = np.ones(experts * tensor.columns, np.float32)
        expert = next(piece.inside(0, 1)).stored // tensor.shape[-2]
        own = Importance(sums[None].astype(np.float32), np.array([tokens], np.float32))
        entry = self._entries[tensor.name]
        entry.in_sum2[expert], entry.counts[expert] = own.in_sum2[0], own.counts[0]
        self._importance[tensor.name].reshape(experts, -1)[expert] = own.mean()

    def finish(self, calibration: CalibrationWindows | None) -> FinishedFiles:
        """See `Writer`: the importance matrix, as llama-imatrix would have written it.

        Raises:
            ImatrixError: a sum is not finite.
            BackendError: a matrix of the plan was never observed.
        """
        if missing := sorted(self._imatrix.shapes.keys() - self._entries.keys()):
            raise BackendError(
                missing[0], found="no second moments", expected="those of every matrix",
                remedy="This is a defect of the tour.",
            )  # fmt: skip
        planned = self._imatrix
        if calibration is not None:
            planned = replace(
                planned,
                datasets=(calibration.source,),
                chunks=len(calibration.ids),
                chunk_size=calibration.window,
            )
        write_durably(self._folder / planned.file, planned.content(self._entries))
        return FinishedFiles((planned.file,))
