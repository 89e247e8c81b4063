"""The walk through the model, one decoder layer in memory at a time; what needs activations rides along.

At each layer the base's values go into one set of buffers, with the adapters beside them as they were trained, and all
windows pass: that is the reference, and second moments are taken from its calibration windows. Then the merged values
go into the same buffers, and for each output that is solved for (GPTQ) the calibration windows pass twice: once to take
the Hessians, and once more through the weights that were solved, whose outputs the next layer is given.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.staging import sync_folder, write_durably
from exporter.backends.base import ObservingWriter, SolvingWriter
from exporter.backends.gptq.hessian import Moments
from exporter.errors import BackendError, MissingTensorError
from exporter.merge import Merger, RowBlock
from exporter.model import EMBEDDING, MergedModel, MergedTensor
from exporter.tour.activations import SecondMoments, shared_inputs, watching
from exporter.tour.sizes import BATCH_TOKENS
from exporter.tour.skeleton import Arguments, Skeleton
from exporter.tour.states import Group, States
from exporter.tour.stream import Rider, Stream, Target


@dataclass(frozen=True)
class Solver:
    """One artifact whose matrices are solved for from Hessians.

    Attributes:
        label: its name.
        sources: the merged tensors that are solved for.
        writer: takes weights and Hessians, and gives back what it stored.
    """

    label: str
    sources: frozenset[str]
    writer: SolvingWriter


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
        keep_bytes: hidden states up to this size stay in memory.
        scratch: folder for what a killed run goes on from, and for larger hidden states; None for neither.
        on_layer: called after each layer with the number of layers that are done, and of all.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    keep_bytes: int = 4 << 30
    scratch: Path | None = None
    on_layer: Callable[[int, int], None] = lambda _done, _layers: None


class Walk:
    """One walk.

    Args:
        model: the merged model.
        stream: merges its tensors.
        passengers: who rides along.
        evaluation: windows whose final hidden states are wanted.
        calibration: windows that statistics are taken from.
        settings: how to walk.

    Raises:
        RuntimeScoreError: transformers or peft cannot make the model.
    """

    def __init__(
        self,
        model: MergedModel,
        stream: Stream,
        passengers: Passengers,
        *,
        evaluation: Group | None,
        calibration: Group | None,
        settings: Settings,
    ) -> None:
        self._model, self._stream, self._passengers, self._settings = model, stream, passengers, settings
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        watched = calibration if passengers.observers else None
        self._trained = [group for group in (evaluation, watched) if group is not None]
        self._calibration = calibration
        if calibration is None and (passengers.observers or passengers.solvers):
            raise BackendError("the tour", found="no calibration tokens", expected="some", remedy="This is a defect.")
        options = (settings.device, settings.dtype)
        self._beside = Skeleton(model, *options, adapters=True)
        self._merged = Skeleton(model, *options, adapters=False) if passengers.solvers else self._beside
        self._arguments: dict[int, list[Arguments]] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._hidden = int(model.config["hidden_size"])
        if settings.scratch is not None:
            settings.scratch.mkdir(exist_ok=True)
        self._states = {
            journey: [self._new_states(journey, group) for group in groups] for journey, groups in self._journeys()
        }

    def run(self) -> list[States]:
        """Walk.

        Returns:
            Hidden states after the last layer, before the norm, of each of the trained model's groups.

        Raises:
            RuntimeScoreError: the tensors are not the ones that the model's code has.
            NonFiniteTensorError: a tensor holds NaN or infinity.
            ExporterError: whatever a writer raised.
        """
        layers = self._by_layer()
        start = self._resume()
        with ExitStack() as stack:
            stack.callback(self._close_but_trained)
            inside = {tensor.name for tensors in layers for tensor in tensors}
            outside = [tensor for tensor in self._model.tensors if tensor.name not in inside]
            before = [tensor for tensor in outside if tensor.name == EMBEDDING]
            self._offer(before, self._passengers.riders)
            if start == 0:
                self._embed()
            for index, tensors in enumerate(layers):
                if index < start:
                    self._offer(tensors, [*self._passengers.riders, *self._passengers.observers])
                else:
                    self._layer(index, tensors)
                    self._commit(index + 1)
                    release_free_memory()
                self._settings.on_layer(index + 1, len(layers))
            self._offer([tensor for tensor in outside if tensor.name != EMBEDDING], self._passengers.riders)
            self._stream.finish()
        return self._states["trained"]

    @property
    def norm_name(self) -> str:
        """Name of the final norm's weight."""
        return self._beside.norm_name

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The model's final norm."""
        return self._beside.normalize(hidden, weight)

    # --- one layer -------------------------------------------------------------------------------------------------

    def _layer(self, index: int, tensors: list[MergedTensor]) -> None:
        moments: dict[str, SecondMoments] = {}
        if self._trained:
            slot = self._fill(self._beside, index, tensors, merged=False, riders=self._passengers.riders)
            self._beside.install(index, slot)
            moments = self._pass_trained(index, tensors)
            self._beside.strip(index)
        else:
            self._offer(tensors, self._passengers.riders)
        if self._passengers.observers:
            self._observe(index, tensors, moments)
        if self._passengers.solvers:
            slot = self._fill(self._merged, index, tensors, merged=True, riders=())
            for solver in self._passengers.solvers:
                self._solve(index, solver, slot)
            self._merged.strip(index)

    def _fill(
        self, skeleton: Skeleton, index: int, tensors: list[MergedTensor], *, merged: bool, riders: Iterable[Rider]
    ) -> dict[str, torch.Tensor]:
        """Read a layer's weights into the buffers, which every layer of the same shapes uses again."""
        prefix = skeleton.layer_prefix(index)
        wanted = skeleton.slots(index)
        slot = {}
        for tensor in tensors:
            if tensor.name in wanted:
                key = tensor.name.removeprefix(prefix)
                if key not in self._buffers or self._buffers[key].shape != tensor.shape:
                    self._buffers[key] = torch.empty(tensor.shape, dtype=self._dtype, device=self._settings.device)
                slot[tensor.name] = self._buffers[key]
        for key in self._buffers.keys() - {name.removeprefix(prefix) for name in slot}:
            del self._buffers[key]
        self._offer(tensors, riders, {name: Target(values, merged) for name, values in slot.items()})
        return slot

    @property
    def _dtype(self) -> torch.dtype:
        """What the buffers hold: float32 where weights are solved for, whatever the layers compute in."""
        return torch.float32 if self._passengers.solvers else self._settings.dtype

    def _pass_trained(self, index: int, tensors: list[MergedTensor]) -> dict[str, SecondMoments]:
        modules = self._beside.modules(index)
        wanted = {name for observer in self._passengers.observers for name in observer.tensors}
        names = [tensor.name for tensor in tensors if tensor.name in wanted and tensor.name in modules]
        moments = {name: SecondMoments(self._tensors[name].shape[-1]) for name in names}
        for states in self._states["trained"]:
            see = {name: one.add for name, one in moments.items()} if states.group is self._calibration else {}
            with watching(modules, see):
                self._forward(self._beside, index, states, keep=True)
        return moments

    def _observe(self, index: int, tensors: list[MergedTensor], moments: Mapping[str, SecondMoments]) -> None:
        if self._settings.scratch is not None:
            content = {name: torch.cat([one.sums, torch.tensor([float(one.tokens)])]) for name, one in moments.items()}
            save_file(content, self._settings.scratch / f"moments-{index}.safetensors")
        self._tell(moments)
        self._offer(tensors, self._passengers.observers)

    def _tell(self, moments: Mapping[str, SecondMoments]) -> None:
        for observer in self._passengers.observers:
            if not isinstance(observer.writer, ObservingWriter):
                raise BackendError(
                    observer.label, found="a writer that does not observe", expected="one that does",
                    remedy="This is a defect of the backend.",
                )  # fmt: skip
            for name, one in moments.items():
                if name in observer.tensors:
                    observer.writer.observe(observer.tensors[name], one.sums.numpy(), one.tokens)

    def _solve(self, index: int, solver: Solver, slot: Mapping[str, torch.Tensor]) -> None:
        self._install(index, slot)
        (states,) = self._states[solver.label]
        modules = self._merged.modules(index)
        groups = shared_inputs(name for name in modules if name in solver.sources)
        hessians = {group: Moments(slot[group[0]].shape[-1], self._settings.device) for group in groups}
        with watching(modules, {group[0]: hessian.add for group, hessian in hessians.items()}):
            self._forward(self._merged, index, states, keep=False)
        self.set_threads()
        for group in groups:
            # Taken out of the dictionary so that its memory goes before the next one is factorized.
            hessian = hessians.pop(group)
            solved = solver.writer.solve({name: slot[name] for name in group}, hessian)
            self._install(index, solved)
        self._forward(self._merged, index, states, keep=True)

    def _install(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        self._merged.install(index, {name: weight.to(self._settings.dtype) for name, weight in weights.items()})

    def _forward(self, skeleton: Skeleton, index: int, states: States, *, keep: bool) -> None:
        """Send all windows of a group through a layer; `keep` says whether its output replaces its input."""
        self.set_threads()
        arguments = self._layer_arguments(skeleton, states.group.length)[index]
        for windows in states.group.batches(BATCH_TOKENS[torch.device(self._settings.device).type]):
            hidden = states.read(windows).to(self._settings.device)
            output = skeleton.forward(index, hidden, arguments)
            if keep:
                states.write(windows, output)

    def _layer_arguments(self, skeleton: Skeleton, length: int) -> list[Arguments]:
        if length not in self._arguments:
            self._arguments[length] = skeleton.arguments(length)
        return self._arguments[length]

    def set_threads(self) -> None:
        """Let torch use all threads, which it must not while row blocks are merged."""
        if self._settings.device == "cpu":
            torch.set_num_threads(self._settings.threads)

    def _offer(
        self, tensors: Iterable[MergedTensor], riders: Iterable[Rider], targets: Mapping[str, Target] | None = None
    ) -> None:
        if self._settings.device == "cpu":
            # Parallelism is over row blocks here.
            torch.set_num_threads(1)
        self._stream.offer(tensors, riders, targets)

    # --- before and after ------------------------------------------------------------------------------------------

    def _journeys(self) -> list[tuple[str, list[Group]]]:
        solved = [self._calibration] if self._calibration is not None else []
        return [("trained", self._trained)] + [(solver.label, solved) for solver in self._passengers.solvers]

    def _new_states(self, journey: str, group: Group) -> States:
        nbytes = group.ids.size * self._hidden * self._settings.dtype.itemsize
        file = None
        if self._settings.scratch is not None and nbytes > self._settings.keep_bytes:
            file = self._settings.scratch / f"hidden {journey} {group.name}"
        return States(group, self._hidden, self._settings.dtype, file)

    def _by_layer(self) -> list[list[MergedTensor]]:
        """The tensors of each layer that the model's code has."""
        layers = []
        for index in range(self._beside.layers):
            prefix = self._beside.layer_prefix(index)
            found = [tensor for tensor in self._model.tensors if tensor.name.startswith(prefix)]
            self._beside.check(index, {tensor.name for tensor in found})
            layers.append(found)
        return layers

    def _embed(self) -> None:
        """Look every token up in the merged embedding."""
        everything = [states for journey in self._states.values() for states in journey]
        if not everything:
            return
        tensor = self._tensors.get(EMBEDDING)
        if tensor is None:
            raise MissingTensorError(
                EMBEDDING, found="no such tensor", expected="the embedding", remedy="Fetch the base again."
            )
        used = np.unique(np.concatenate([states.group.ids.ravel() for states in everything]))
        rows = gather_rows(self._stream.merger, tensor, used.tolist())
        for states in everything:
            for windows in states.group.batches(4096):
                places = torch.from_numpy(np.searchsorted(used, states.group.ids[windows]))
                states.write(windows, rows[places].to(self._settings.dtype))

    # --- going on after a kill -------------------------------------------------------------------------------------

    def _commit(self, layers: int) -> None:
        """Make everything up to a layer durable, so that a killed run goes on after it."""
        scratch = self._settings.scratch
        if scratch is None:
            return
        self._stream.finish()
        for solver in self._passengers.solvers:
            solver.writer.sync()
        for number, states in enumerate(self._all_states()):
            states.save(scratch / f"states-{number}-{layers % 2}")
        write_durably(scratch / "progress.new", json.dumps({"layers": layers}).encode())
        os.replace(scratch / "progress.new", scratch / "progress")
        sync_folder(scratch)

    def _resume(self) -> int:
        """Layers that an earlier run finished; its hidden states and statistics are read back."""
        scratch = self._settings.scratch
        if scratch is None:
            return 0
        try:
            layers = int(json.loads((scratch / "progress").read_bytes())["layers"])
            for number, states in enumerate(self._all_states()):
                states.load(scratch / f"states-{number}-{layers % 2}")
            if self._passengers.observers:
                for index in range(layers):
                    self._tell(_read_moments(scratch / f"moments-{index}.safetensors"))
        except (OSError, ValueError, KeyError):
            return 0
        return layers

    def _all_states(self) -> list[States]:
        return [states for journey in self._states.values() for states in journey]

    def _close_but_trained(self) -> None:
        for journey, found in self._states.items():
            for states in found:
                if journey != "trained":
                    states.close()


def release_free_memory() -> None:
    """Give what was freed back to the system. glibc keeps freed activations of tens of megabytes in its arenas, a few
    more with every layer: 20 MB a layer on a model of 0.5 B parameters."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read_moments(file: Path) -> dict[str, SecondMoments]:
    moments = {}
    for name, values in load_file(file).items():
        moments[name] = one = SecondMoments(values.numel() - 1, int(values[-1]))
        one.sums = values[:-1].clone()
    return moments


def gather_rows(merger: Merger, tensor: MergedTensor, rows: Sequence[int]) -> torch.Tensor:
    """Some merged rows of a tensor: float32 on the CPU, shape (len(rows), columns)."""
    factors = merger.factors(tensor)
    found = torch.empty(len(rows), tensor.source.columns)
    for place, row in enumerate(rows):
        found[place] = merger.block(tensor, RowBlock(row, 1), factors)[0]
    return found
