"""The next layer's weights are read while the one before is computed with, where that was asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.merge.model import MergedTensor
from exporter.tour.riders import Rider
from exporter.tour.stream import Target
from exporter.tour.walk.layer_loader import Load, Loader
from tests.merged import merged_model


class Layers:
    """In place of a skeleton: layers whose slots are all of their tensors."""

    merged = frozenset[str]()

    def __init__(self, tensors: Iterable[MergedTensor]) -> None:
        self._names = [tensor.name for tensor in tensors]

    def layer_prefix(self, index: int) -> str:
        return f"model.layers.{index}."

    def slots(self, index: int) -> set[str]:
        return {name for name in self._names if name.startswith(self.layer_prefix(index))}


class Source:
    """Fills each target with the number of the load, and says when it has.

    Attributes:
        offered: set when as many loads were offered as its place says.
    """

    def __init__(self, loads: int) -> None:
        self.count = 0
        self.offered = [threading.Event() for _ in range(loads)]

    def __call__(self, tensors: Iterable[MergedTensor], riders: Iterable[Rider], targets: Mapping[str, Target]) -> None:
        number, self.count = self.count, self.count + 1
        for target in targets.values():
            target.values.fill_(number)
        self.offered[number].set()


@pytest.mark.parametrize("ahead", [False, True])
def test_the_next_layer_is_read_while_one_is_computed_with(make_base: Callable[..., Path], ahead: bool) -> None:
    tensors = merged_model(make_base("qwen2", layers=3)).tensors
    skeleton: Any = Layers(tensors)
    loads = [
        Load(skeleton, index, [one for one in tensors if one.name in skeleton.slots(index)], True, ())
        for index in range(3)
    ]
    source = Source(len(loads))
    loader = Loader(loads, source, "cpu", torch.float32, ahead=ahead)
    try:
        for number in range(3):
            slot = loader.next()
            assert slot.keys() == skeleton.slots(number)
            if ahead and number < 2:
                # Nobody has asked for it.
                assert source.offered[number + 1].wait(timeout=60)
            assert source.count == min(3, number + 1 + ahead)
            # What is computed with is left alone meanwhile.
            assert all((values == number).all() for values in slot.values())
    finally:
        loader.close()
