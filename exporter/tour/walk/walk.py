"""The walk through the model, one decoder layer in memory at a time; what needs activations rides along.

At each layer the base's values go into one set of buffers, with the adapters beside them as they were trained, and all
windows pass: that is the reference, and second moments are taken from its calibration windows. Then the merged values
go into the same buffers, and for each output that is solved for (GPTQ) the calibration windows pass twice: once to take
the Hessians, and once more through the weights that were solved, whose outputs the next layer is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress

import numpy as np
import torch

from exporter.backends.hessian import Moments
from exporter.errors import BackendError, MissingTensorError
from exporter.families.roles import EMBEDDING, HEAD, is_dense_down, shared_inputs
from exporter.inputs.row_blocks import DTYPES
from exporter.libraries.torch_threads import use_threads
from exporter.merge.merger import gather_rows
from exporter.merge.model import MergedModel, MergedTensor
from exporter.tour.riders import Passengers, Rider, Settings, Solver, Walked
from exporter.tour.stream import Stream, Target
from exporter.tour.walk.activations import SecondMoments, SeenEnoughError, watching
from exporter.tour.walk.freed_memory import keep_freed_memory, release_free_memory
from exporter.tour.walk.hidden_states import Group, States
from exporter.tour.walk.layer_loader import Load, Loader, Slot
from exporter.tour.walk.resume import Findings, load_moments, load_progress, save_moments, save_progress
from exporter.tour.walk.sizes import BATCH_TOKENS, stay_in_memory
from exporter.tour.walk.skeleton import Arguments, Skeleton


class Walk:
    """One walk.

    Args:
        model: the merged model.
        stream: merges its tensors.
        passengers: who rides along.
        evaluation: windows whose final hidden states are wanted.
        more: further such windows, of other lengths; each group with a name of its own.
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
        more: Sequence[Group] = (),
    ) -> None:
        self._model, self._stream, self._passengers, self._settings = model, stream, passengers, settings
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        watched = calibration if passengers.observers else None
        self._trained = [group for group in (evaluation, *more, watched) if group is not None]
        self._evaluation, self._calibration = evaluation, calibration
        if calibration is None and (passengers.observers or passengers.solvers):
            raise BackendError("the tour", found="no calibration tokens", expected="some", remedy="This is a defect.")
        options = (settings.device, settings.dtype)
        self._beside = Skeleton(model, *options, adapters=bool(self._trained))
        both = bool(self._trained and passengers.solvers and model.adapters)
        self._merged = Skeleton(model, *options, adapters=False) if both else self._beside
        self._arguments: dict[int, list[Arguments]] = {}
        self._hidden = int(model.config["hidden_size"])
        self._findings = Findings()
        if settings.scratch is not None:
            settings.scratch.mkdir(exist_ok=True)
        self._states = self._new_states()

    def run(self) -> Walked:
        """Walk.

        Raises:
            RuntimeScoreError: the tensors are not the ones that the model's code has.
            NonFiniteTensorError: a tensor holds NaN or infinity.
            ExporterError: whatever a writer raised.
        """
        layers = self._by_layer()
        start = self._resume()
        keep_freed_memory()
        with ExitStack() as stack:
            stack.callback(self._close_but_trained)
            inside = {tensor.name for tensors in layers for tensor in tensors}
            outside = [tensor for tensor in self._model.tensors if tensor.name not in inside]
            before = [tensor for tensor in outside if tensor.name == EMBEDDING]
            self._offer(before, self._passengers.riders)
            if start == 0:
                self._embed()
            loads, settings = self._loads(layers, start), self._settings
            loader = Loader(loads, self._offer, settings.device, self._dtype, ahead=settings.ahead)
            stack.callback(loader.close)
            for index, tensors in enumerate(layers):
                if index < start:
                    self._offer(tensors, [*self._passengers.riders, *self._passengers.observers])
                else:
                    self._layer(index, tensors, loader)
                    self._commit(index + 1)
                    release_free_memory()
                self._settings.on_layer(index + 1, len(layers))
            loader.close()
            norm, head = self._offer_rest([tensor for tensor in outside if tensor.name != EMBEDDING])
            self._stream.finish()
        return Walked(self._states["trained"], norm, head, self._findings.by_label)

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The model's final norm."""
        return self._beside.normalize(hidden, weight)

    # --- one layer -------------------------------------------------------------------------------------------------

    def _layer(self, index: int, tensors: Sequence[MergedTensor], loader: Loader) -> None:
        moments: dict[str, SecondMoments] = {}
        if self._trained:
            self._install(self._beside, index, loader.next())
            moments = self._pass_trained(index, tensors)
            self._beside.strip(index)
        if self._passengers.observers:
            self._observe(index, tensors, moments)
        if self._passengers.solvers:
            slot = loader.next()
            for solver in self._passengers.solvers:
                self._solve(index, solver, slot)
            self._merged.strip(index)

    def _loads(self, layers: Sequence[Sequence[MergedTensor]], start: int) -> list[Load]:
        """Every reading of every layer to come; riders are served by the first one of each."""
        loads = []
        for index in range(start, len(layers)):
            riders = self._passengers.riders
            if self._trained:
                loads.append(Load(self._beside, index, layers[index], merged=False, riders=riders))
                riders = ()
            if self._passengers.solvers:
                loads.append(Load(self._merged, index, layers[index], merged=True, riders=riders))
        return loads

    @property
    def _dtype(self) -> torch.dtype:
        """What the buffers hold: float32 where weights are solved for, whatever the layers compute in."""
        return torch.float32 if self._passengers.solvers else self._settings.dtype

    def _pass_trained(self, index: int, tensors: Sequence[MergedTensor]) -> dict[str, SecondMoments]:
        modules = self._beside.modules(index)
        wanted = {name for observer in self._passengers.observers for name in observer.tensors}
        names = [tensor.name for tensor in tensors if tensor.name in wanted and tensor.name in modules]
        moments = {name: SecondMoments(self._tensors[name].shape[-1]) for name in names}
        for states in self._states["trained"]:
            see = {name: one.add for name, one in moments.items()} if states.group is self._calibration else {}
            with watching(modules, see):
                self._forward(self._beside, index, states, keep=True)
        return moments

    def _observe(self, index: int, tensors: Sequence[MergedTensor], moments: Mapping[str, SecondMoments]) -> None:
        if self._settings.scratch is not None:
            save_moments(self._settings.scratch, index, moments)
        self._tell(moments)
        self._offer(tensors, self._passengers.observers)

    def _tell(self, moments: Mapping[str, SecondMoments]) -> None:
        for observer in self._passengers.observers:
            for name, one in moments.items():
                for plan, piece in observer.tensors.get(name, ()):
                    observer.writer.observe(plan, piece, one.sums.numpy(), one.tokens)

    def _solve(self, index: int, solver: Solver, slot: Slot) -> None:
        self._install(self._merged, index, slot)
        (states,) = self._states[solver.label]
        modules = self._merged.modules(index)
        groups = shared_inputs(name for name in modules if name in solver.sources)
        for batch in [[group] for group in groups] if solver.sequential else [groups]:
            hessians = {group: Moments(slot[group[0]].shape[-1], self._settings.device) for group in batch}
            see = {group[0]: hessian.add for group, hessian in hessians.items()}
            with watching(modules, see, last=self._last(batch)):
                self._forward(self._merged, index, states, keep=False)
            self.set_threads()
            for group in batch:
                # Taken out of the dictionary so that its memory goes before the next one is factorized.
                hessian = hessians.pop(group)
                solved = solver.writer.solve({name: slot[name] for name in group}, hessian)
                self._findings.add(solver.label, solved.findings)
                self._install(self._merged, index, solved.weights)
        self._forward(self._merged, index, states, keep=True)

    @staticmethod
    def _last(groups: Sequence[tuple[str, ...]]) -> str | None:
        """The weight after whose input a layer has nothing more to show: that of a dense block's last product."""
        last = groups[-1][0]
        return last if is_dense_down(last) else None

    def _install(self, skeleton: Skeleton, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """In what the layers compute in, or by promotion they would compute in what the buffers hold."""
        skeleton.install(index, {name: weight.to(self._settings.dtype) for name, weight in weights.items()})

    def _forward(self, skeleton: Skeleton, index: int, states: States, *, keep: bool) -> None:
        """Send all windows of a group through a layer; `keep` says whether its output replaces its input."""
        self.set_threads()
        arguments = self._layer_arguments(skeleton, states.group.length)[index]
        for windows in states.group.batches(BATCH_TOKENS[torch.device(self._settings.device).type]):
            hidden = states.read(windows).to(self._settings.device)
            with suppress(SeenEnoughError):
                output = skeleton.forward(index, hidden, arguments)
                if keep:
                    states.write(windows, output)

    def _layer_arguments(self, skeleton: Skeleton, length: int) -> list[Arguments]:
        if length not in self._arguments:
            self._arguments[length] = skeleton.arguments(length)
        return self._arguments[length]

    def set_threads(self) -> None:
        """Let torch use the threads, which it must not while row blocks are merged."""
        if self._settings.device == "cpu":
            use_threads(self._settings.threads)

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

    def _new_states(self) -> dict[str, list[States]]:
        """Hidden states of every journey; those that do not stay in memory are in a file, if there is a folder."""
        scratch, dtype = self._settings.scratch, self._settings.dtype
        travelling = [(journey, group) for journey, groups in self._journeys() for group in groups]
        sizes = [group.ids.size * self._hidden * dtype.itemsize for _, group in travelling]
        states: dict[str, list[States]] = {journey: [] for journey, _ in self._journeys()}
        for (journey, group), stays in zip(travelling, stay_in_memory(sizes, self._settings.keep_bytes), strict=True):
            file = None if stays or scratch is None else scratch / f"hidden {journey} {group.name}"
            states[journey].append(States(group, self._hidden, dtype, file))
        return states

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

    def _offer_rest(self, tensors: list[MergedTensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Offer what comes after the layers; norm and head are kept if there is something to score with them."""
        targets: dict[str, Target] = {}
        norm = head = None
        if self._evaluation is not None:
            norm = self._target(self._tensors.get(self._beside.norm_name), self._beside.norm_name, targets, exact=True)
            tensor = self._model.head
            head = self._target(tensor, HEAD, targets, exact=tensor is not None and bool(tensor.updates))
        self._offer(tensors, self._passengers.riders, targets)
        if EMBEDDING in targets:
            # A tied head: the embedding came first, and was not kept since.
            self._offer([self._tensors[EMBEDDING]], (), targets)
        return norm, head

    def _target(
        self, tensor: MergedTensor | None, name: str, targets: dict[str, Target], *, exact: bool
    ) -> torch.Tensor:
        """Memory for a whole merged tensor; `name` is what to miss if there is none."""
        if tensor is None:
            raise MissingTensorError(name, found="no such tensor", expected="one", remedy="Fetch the base again.")
        dtype = torch.float32 if exact else DTYPES[tensor.source.dtype]
        values = torch.empty(tensor.shape, dtype=dtype, device=self._settings.device)
        targets[tensor.name] = Target(values, merged=True)
        return values

    # --- going on after a kill -------------------------------------------------------------------------------------

    def _commit(self, layers: int) -> None:
        """Make everything up to a layer durable, so that a killed run goes on after it."""
        if self._settings.scratch is None:
            return
        self._stream.finish()
        for solver in self._passengers.solvers:
            solver.writer.sync()
        save_progress(self._settings.scratch, self._key, layers, self._all_states(), self._findings)

    def _resume(self) -> int:
        """Layers that an earlier run finished; its hidden states and statistics are read back."""
        scratch = self._settings.scratch
        if scratch is None:
            return 0
        layers = load_progress(scratch, self._key, self._all_states(), self._findings)
        if self._passengers.observers:
            moments = load_moments(scratch, layers)
            if moments is None:
                self._findings.by_label.clear()
                return 0
            for some in moments:
                self._tell(some)
        return layers

    @property
    def _key(self) -> str:
        """Journeys and their windows belong to the key: saved states are theirs."""
        journeys = [(journey, states.group.name) for journey, found in self._states.items() for states in found]
        return f"{self._settings.key} {journeys}"

    def _all_states(self) -> list[States]:
        return [states for journey in self._states.values() for states in journey]

    def _close_but_trained(self) -> None:
        for journey, found in self._states.items():
            for states in found:
                if journey != "trained":
                    states.close()
