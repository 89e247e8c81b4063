"""The weights of one layer after the other, in buffers that every layer of the same shapes uses again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from exporter.merge.model import MergedTensor
from exporter.tour.riders import Rider
from exporter.tour.stream import Target
from exporter.tour.walk.skeleton import Skeleton

Offer = Callable[[Iterable[MergedTensor], Iterable[Rider], Mapping[str, Target]], None]
Slot = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Load:
    """One reading of a layer.

    Attributes:
        skeleton: the model's code that will take the weights.
        index: the layer's number.
        tensors: the layer's tensors.
        merged: whether the merged values are wanted, or the base's own.
        riders: artifacts that take the tensors on the way.
    """

    skeleton: Skeleton
    index: int
    tensors: Sequence[MergedTensor]
    merged: bool
    riders: Sequence[Rider]


class Loader:
    """Works off loads in order.

    Args:
        loads: all of them, in the order in which they are asked for.
        offer: merges tensors for riders and targets.
        device: where the buffers are.
        dtype: what they hold.
        ahead: read the next load while the one before is computed with. It takes a second set of buffers.
    """

    def __init__(
        self, loads: Sequence[Load], offer: Offer, device: str, dtype: torch.dtype, *, ahead: bool = False
    ) -> None:
        self._loads, self._offer, self._device, self._dtype = list(loads), offer, device, dtype
        self._sets: list[dict[str, torch.Tensor]] = [{}, {}] if ahead else [{}]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="load") if ahead else None
        self._done = 0
        self._waiting: Future[Slot] | None = None

    def next(self) -> Slot:
        """The weights of the next load by the checkpoint's names; they are valid until it is called again.

        Raises:
            NonFiniteTensorError: a tensor holds NaN or infinity.
            ExporterError: whatever a writer raised.
        """
        waiting, self._waiting = self._waiting, None
        slot = waiting.result() if waiting is not None else self._load(self._done)
        self._done += 1
        if self._pool is not None and self._done < len(self._loads):
            self._waiting = self._pool.submit(self._load, self._done)
        return slot

    def close(self) -> None:
        """Give the buffers back; a load that is under way is waited for."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._sets = [{} for _ in self._sets]

    def _load(self, number: int) -> Slot:
        load, buffers = self._loads[number], self._sets[number % len(self._sets)]
        prefix, wanted = load.skeleton.layer_prefix(load.index), load.skeleton.slots(load.index)
        slot = {}
        for tensor in load.tensors:
            if tensor.name in wanted:
                key = tensor.name.removeprefix(prefix)
                if key not in buffers or buffers[key].shape != tensor.shape:
                    buffers[key] = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
                slot[tensor.name] = buffers[key]
        for key in buffers.keys() - {name.removeprefix(prefix) for name in slot}:
            del buffers[key]
        beside = load.skeleton.merged
        targets = {name: Target(values, load.merged or name in beside) for name, values in slot.items()}
        self._offer(load.tensors, load.riders, targets)
        return slot
