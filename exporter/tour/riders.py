"""Who rides along on a walk, how it is done, and what it brings back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.artifact.staging import Staging
from exporter.backends.base import Finding, Writer
from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import Piece
from exporter.tour.walk.hidden_states import States
from exporter.tour.walk.sizes import KEEP_BYTES


@dataclass(frozen=True)
class Solver:
    """One artifact whose matrices are solved for from Hessians.

    Attributes:
        label: its name.
        sources: the merged tensors that are solved for.
        writer: takes weights and Hessians, and gives back what it stored.
        sequential: take the Hessian of each matrix after those before it in the same layer were solved; otherwise all
            Hessians of a layer are taken from its unsolved weights. It costs two more passes.
    """

    label: str
    sources: frozenset[str]
    writer: Writer
    sequential: bool = False


@dataclass(frozen=True)
class Passengers:
    """What rides along.

    Attributes:
        riders: artifacts that take tensors as they come.
        observers: artifacts that take tensors once their second moments are known.
        solvers: artifacts whose matrices are solved for.
    """

    riders: Sequence[Rider] = ()
    observers: Sequence[Rider] = ()
    solvers: Sequence[Solver] = ()


@dataclass(frozen=True)
class Settings:
    """How to walk.

    Attributes:
        device: where layers compute.
        dtype: what they compute in; statistics are float32 or better all the same.
        threads: threads of a layer's forward on the CPU.
        keep_bytes: all hidden states together stay in memory up to this size.
        scratch: folder for what a killed run goes on from, and for larger hidden states; None for neither.
        key: what the walk is for; a run goes on from what is in `scratch` only under the same key.
        ahead: read the next layer's weights while this one computes, which pays where layers compute on another device.
        on_layer: called after each layer with the number of layers that are done, and of all.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    keep_bytes: int = KEEP_BYTES
    scratch: Path | None = None
    key: str = ""
    ahead: bool = False
    on_layer: Callable[[int, int], None] = lambda _done, _layers: None


@dataclass(frozen=True)
class Walked:
    """What a walk brings back.

    Attributes:
        states: hidden states after the last layer, before the norm, of each of the trained model's groups.
        norm: weight of the final norm: float32, shape (hidden,); None without evaluation windows.
        head: merged rows of the head, shape (vocabulary, hidden), in the base's own dtype where no adapter changes it,
            else float32; None without evaluation windows.
        findings: what became of the matrices of each solver, by its label.
    """

    states: list[States]
    norm: torch.Tensor | None
    head: torch.Tensor | None
    findings: Mapping[str, Sequence[Finding]]


@dataclass(frozen=True, eq=False)
class Rider:
    """One artifact on the tour. Riders are told apart by identity: two folders may have artifacts of one label.

    Attributes:
        label: its name in the journal of its staging folder.
        tensors: by the merged tensor's name, its stored tensors that rows of it go to, and which of these.
        writer: where its rows go.
        staging: the folder that it is written under.
    """

    label: str
    tensors: Mapping[str, tuple[tuple[TensorPlan, Piece], ...]]
    writer: Writer
    staging: Staging

    @classmethod
    def of(cls, label: str, plans: Iterable[TensorPlan], writer: Writer, staging: Staging) -> Rider:
        """A rider that stores these tensors."""
        tensors: dict[str, list[tuple[TensorPlan, Piece]]] = {}
        for plan in plans:
            for piece in plan.pieces:
                tensors.setdefault(piece.source, []).append((plan, piece))
        return cls(label, {source: tuple(found) for source, found in tensors.items()}, writer, staging)

    @property
    def plans(self) -> tuple[TensorPlan, ...]:
        """Its stored tensors, each once."""
        return tuple({plan.name: plan for found in self.tensors.values() for plan, _ in found}.values())
