"""A stored tensor is made of pieces: rows of merged tensors, each with its place in the stored one.

Most stored tensors have one piece, a whole merged tensor. A stack of experts has one for each expert; a matrix that is
split, or whose heads are put in another order, takes runs of rows. The tour writes by this data, and the readers of
`exporter.verify` go by the same, so another program must be the witness that it is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

# Values as they are; -exp(x), as llama.cpp stores A_log; x + 1, as it stores norms whose code adds one.
Value = Literal["identity", "neg_exp", "plus_one"]


@dataclass(frozen=True)
class RowRun:
    """Rows that follow each other in the merged tensor and in the stored one.

    Attributes:
        source: first row in the merged tensor, seen as a matrix.
        stored: first row in the stored tensor, seen as a matrix.
        count: number of rows.
    """

    source: int
    stored: int
    count: int


@dataclass(frozen=True)
class Piece:
    """Rows of one merged tensor.

    Attributes:
        source: name of the merged tensor.
        runs: its rows that are taken, with their places; None for all of them, from the first stored row on.
    """

    source: str
    runs: tuple[RowRun, ...] | None = None

    def inside(self, first: int, count: int) -> Iterator[RowRun]:
        """The runs within some rows of the merged tensor.

        Args:
            first: the first of these rows.
            count: how many there are.
        """
        if self.runs is None:
            yield RowRun(first, first, count)
            return
        for run in self.runs:
            start, end = max(first, run.source), min(first + count, run.source + run.count)
            if start < end:
                yield RowRun(start, run.stored + start - run.source, end - start)


def whole(source: str) -> tuple[Piece, ...]:
    """The pieces of a stored tensor that is one merged tensor, row by row."""
    return (Piece(source),)


def stack(sources: Iterable[str], rows: int) -> tuple[Piece, ...]:
    """The pieces of merged matrices that are stored one after the other.

    Args:
        sources: names of the merged tensors, in order.
        rows: rows of each.
    """
    return tuple(Piece(source, (RowRun(0, number * rows, rows),)) for number, source in enumerate(sources))


@dataclass(frozen=True)
class Arrangement:
    """How the values of stored rows come from those of merged rows.

    Attributes:
        column_order: for each stored column the merged one; None if they are the same.
        value: what each value becomes.
    """

    column_order: tuple[int, ...] | None = None
    value: Value = "identity"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Stored values of merged rows.

        Args:
            rows: float32, shape (rows, columns); not changed.
        """
        if self.column_order is not None:
            rows = rows[:, list(self.column_order)]
        if self.value == "neg_exp":
            return -rows.exp()
        return rows + 1 if self.value == "plus_one" else rows

    def undo(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Merged values of stored rows; of `neg_exp`, a value that is not negative becomes NaN.

        Args:
            rows: float32, shape (rows, columns); not changed.
        """
        import numpy as np

        if self.value == "neg_exp":
            with np.errstate(invalid="ignore", divide="ignore"):
                rows = np.log(-rows)
        elif self.value == "plus_one":
            rows = rows - np.float32(1)
        if self.column_order is None:
            return rows
        merged = np.empty_like(rows)
        merged[:, list(self.column_order)] = rows
        return merged


AS_IT_IS = Arrangement()
