"""What a layer's linear modules see: inputs gathered by hooks while windows pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class SeenEnoughError(Exception):
    """Ends the forward of a layer of which only the inputs of its modules are wanted."""


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], see: Mapping[str, Callable[[torch.Tensor], None]], last: str | None = None
) -> Iterator[None]:
    """While this is entered, hand the inputs of some modules to functions.

    Args:
        modules: modules by the name of their weight.
        see: by the name of a weight, what takes each input, shape (tokens, in_features).
        last: the weight after whose input the forward is ended with `SeenEnoughError`; None for none.
    """

    def hook(name: str, take: Callable[[torch.Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            take(inputs[0].reshape(-1, inputs[0].shape[-1]))
            if name == last:
                raise SeenEnoughError

        return before

    with ExitStack() as stack:
        for name, take in see.items():
            handle = modules[name].register_forward_pre_hook(hook(name, take))
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
