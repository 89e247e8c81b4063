"""The plan of one artifact: files, tensors, and the activations that they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from exporter.backends.pieces import AS_IT_IS, Arrangement, Piece
from exporter.runtimes.artifact_facts import ArtifactFacts, PackedWeights

# Merged weights alone; second moments of the inputs of some matrices; Hessians to solve for them; calibration tokens.
Needs = Literal["nothing", "moments", "hessians", "tokens"]


@dataclass(frozen=True)
class TensorPlan:
    """One stored tensor: what it is made from, its type, and where its rows go.

    Attributes:
        name: its name in the output.
        pieces: the rows of merged tensors that it is made from; `whole(name)` for all of one.
        shape: its dimensions, outermost first.
        type: the type it is stored in, in the format's own words (`Q6_K`, `BF16`).
        file: the file it goes to, relative to the output folder.
        offset: byte in that file where it starts.
        row_bytes: bytes of one stored row.
        fallback_from: the type that the rules asked for, if its shape does not allow that one.
        arrangement: how its values come from those of the merged rows.
    """

    name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    type: str
    file: str
    offset: int
    row_bytes: int
    fallback_from: str | None = None
    arrangement: Arrangement = AS_IT_IS

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the merged tensors that it is made from."""
        return tuple(piece.source for piece in self.pieces)

    @property
    def checksum_name(self) -> str:
        """The name that its checksum goes by: that of the merged tensor if it is a whole one, else its own."""
        only = self.pieces[0]
        return only.source if len(self.pieces) == 1 and only.runs is None else self.name

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
        packed: every kind of packed weights in it, for which a runtime needs more than for others.
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
    packed: frozenset[PackedWeights] = frozenset()
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
    def facts(self) -> ArtifactFacts:
        """What a runtime goes by that is asked whether it serves the artifact."""
        return ArtifactFacts(self.format, self.quant, self.entry, frozenset(self.names(self.made)), self.packed)

    @property
    def fallbacks(self) -> tuple[TensorPlan, ...]:
        """The tensors whose shape forced another type than the rules asked for."""
        return tuple(tensor for tensor in self.tensors if tensor.fallback_from)
