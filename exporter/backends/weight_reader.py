"""The base class of readers that read an artifact's weights back, and what they say of a stored weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from exporter.backends.pieces import AS_IT_IS, Arrangement, Piece, RowRun

# Tensors that are named for the same fault.
NAMED = 3


def named_faults(faults: Sequence[str]) -> Iterator[str]:
    """The first ones, and how many more there are.

    Args:
        faults: one a tensor, all of the same kind.
    """
    yield from faults[:NAMED]
    if len(faults) > NAMED:
        yield f"so it is with {len(faults) - NAMED} more tensors"


@dataclass(frozen=True)
class Tolerance:
    """How far values of a type may be from the merge; measured, docs/measurements has the runs.

    Attributes:
        error: largest relative error of a tensor: |stored - merged| / |merged|, Frobenius norms.
        group: the same of one group.
        gain: largest |<stored - merged, merged>| / |merged|^2 of a group: by how much its scale is off. Of `clipped`
            types half of that counts where the group is smaller than merged and its error does not go along with it.
        resolution: root mean square of an error that a group may have whatever its values are, because its scale has
            a smallest step.
        clipped: whether sound groups may lose their largest values because these hardly meet an input.
    """

    error: float
    group: float
    gain: float
    resolution: float
    clipped: bool = False


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the model as it is found in the files.

    Attributes:
        name: its name in the files; of several that make up a weight, the one with the codes.
        source: name of the merged tensor; of several in one stored tensor, one of them.
        type: the type it is stored in, in the format's own words.
        shape: its dimensions as a weight, outermost first.
        group: columns that share a scale; 1 if none is shared and every element is rounded by itself.
        block: columns whose scales share a scale; `group` if there is none above it.
        tolerance: what the type allows.
        piece: the rows of the stored tensor that are this merged tensor's; None if it is a whole one.
        arrangement: how the stored values come from the merged ones.
    """

    name: str
    source: str
    type: str
    shape: tuple[int, ...]
    group: int
    block: int
    tolerance: Tolerance
    piece: Piece | None = None
    arrangement: Arrangement = AS_IT_IS

    @property
    def key(self) -> str:
        """The name that it goes by among an artifact's weights."""
        return self.source if self.piece is None else f"{self.source} in {self.name}"

    @property
    def checksum_name(self) -> str:
        """See `TensorPlan.checksum_name`."""
        return self.source if self.piece is None else self.name

    @property
    def rows(self) -> int:
        """Rows of the stored tensor, seen as a matrix."""
        return prod(self.shape[:-1])

    def inside(self, first: int, count: int) -> Iterable[RowRun]:
        """Where some rows of the merged tensor are stored; see `Piece.inside`."""
        return [RowRun(first, first, count)] if self.piece is None else self.piece.inside(first, count)


def in_pieces(stored: StoredWeight, pieces: Sequence[Piece], arrangement: Arrangement) -> list[StoredWeight]:
    """The merged tensors in a stored one.

    Args:
        stored: the stored tensor.
        pieces: what it is made from.
        arrangement: how its values come from those of the merged rows.
    """
    whole = len(pieces) == 1 and pieces[0].runs is None
    return [
        replace(stored, source=piece.source, piece=None if whole else piece, arrangement=arrangement)
        for piece in pieces
    ]


# Groups of a tensor that are named; more are counted.
NAMED_GROUPS = 3


@dataclass(frozen=True)
class ImpossibleGroups:
    """Groups of stored weights that are close to the merge, and are not what a quantizer makes of it.

    Attributes:
        count: how many.
        named: where the first of them are, what was found and what was expected, in words.
    """

    count: int = 0
    named: tuple[str, ...] = ()

    def plus(self, other: ImpossibleGroups) -> ImpossibleGroups:
        """Both together."""
        return ImpossibleGroups(self.count + other.count, (*self.named, *other.named)[:NAMED_GROUPS])


@dataclass(frozen=True)
class StoredRows:
    """Some rows of a weight as they were read.

    Attributes:
        values: what a runtime computes with: float32, shape (rows, columns).
        encoded: what checksums of them are taken of (`exporter.backends.writing.checksums`): uint8, shape (rows, bytes
            of a row), contiguous. The rows as they are stored; where several rows are packed together, the bytes of
            their values. None if the backend takes no checksums.
    """

    values: npt.NDArray[np.float32]
    encoded: npt.NDArray[np.uint8] | None


class WeightReader(ABC):
    """Reads stored weights back from the files of an artifact, by nothing but what is in them.

    Attributes:
        weights: the weights that can be read, by their keys: the merged tensor's name, where it is stored as a whole.
        faults: the faults of the files, in words: a tensor that is missing, cut off, or not of the type that the
            artifact's name promises.
    """

    weights: Mapping[str, StoredWeight]
    faults: tuple[str, ...]

    @abstractmethod
    def rows(self, weight: StoredWeight, first: int, count: int) -> StoredRows:
        """Read some rows of the stored tensor. Called from several threads.

        Raises:
            ArtifactError: they contradict the format.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every file."""

    def impossible_groups(
        self, weight: StoredWeight, first: int, stored: StoredRows, merged: npt.NDArray[np.float32], noise: float
    ) -> ImpossibleGroups:
        """Groups of some rows that the quantizer cannot have made from the merge. Called from several threads.

        A reader overrides this where it knows its quantizer exactly enough to see faults that rounding hides. By
        default there are none.

        Args:
            weight: the weight.
            first: number of the first row.
            stored: what `rows` returned of these.
            merged: the merged rows: float32, shape (rows, columns), which are not changed.
            noise: how far the rows that were quantized may be off these, as a share of the largest values around each.
        """
        del weight, first, stored, merged, noise
        return ImpossibleGroups()
