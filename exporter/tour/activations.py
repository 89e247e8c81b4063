"""What a layer's linear modules see: inputs gathered by hooks while windows pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Modules below one parent that are given the same input; vLLM fuses the same ones into one matrix.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def shared_inputs(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group weights by the input that their modules share, in the order of the first of each group.

    Args:
        names: names of weights, such as `model.layers.0.mlp.up_proj.weight`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        kind = next((members[0] for members in SHARED_INPUT if leaf in members), leaf)
        groups.setdefault((parent, kind), []).append(name)
    return [tuple(group) for group in groups.values()]


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Mapping[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
    """While this is entered, hand the inputs of some modules to functions.

    Args:
        modules: modules by the name of their weight.
        see: by the name of a weight, what takes each input, shape (tokens, in_features).
    """

    def hook(take: Callable[[torch.Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            take(inputs[0].reshape(-1, inputs[0].shape[-1]))

        return before

    with ExitStack() as stack:
        for name, take in see.items():
            handle = modules[name].register_forward_pre_hook(hook(take))
            stack.callback(handle.remove)
        yield


@dataclass
class SecondMoments:
    """Sum of squares by column of everything that a module was given.

    Attributes:
        columns: in_features.
        tokens: rows seen.
        sums: float64, shape (columns,), on the CPU.
    """

    columns: int
    tokens: int = 0
    sums: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(self.columns, dtype=torch.float64)

    def add(self, inputs: torch.Tensor) -> None:
        """Take rows of shape (tokens, columns)."""
        self.tokens += inputs.shape[0]
        self.sums += inputs.float().square().sum(dim=0, dtype=torch.float64).cpu()
