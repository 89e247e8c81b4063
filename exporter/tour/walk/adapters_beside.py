"""Adapters beside the layers of the model's own code, unmerged."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from exporter.adapters.adapter import Adapter
from exporter.adapters.peft_layers import unloadable


def linear_layers(layers: nn.Module) -> list[str]:
    """The paths of all linear layers."""
    return [path for path, module in layers.named_modules() if isinstance(module, nn.Linear)]


def attach(
    whole: nn.Module, adapters: Sequence[Adapter], linear: Collection[str], device: str, dtype: torch.dtype
) -> None:
    """Put every adapter beside the linear layers that it changes, by its method: active and unmerged.

    Args:
        whole: the model.
        adapters: the adapters.
        linear: names of the layers that they may be beside.
        device: where their weights go.
        dtype: what those are turned into.

    Raises:
        RuntimeScoreError: peft cannot do it, or did something else.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [f"adapter_{index}" for index in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        wanted = [update for module, update in adapter.updates.items() if module in linear]
        if not wanted:
            continue
        try:
            adapter.method.attach(whole, name, adapter.folder, wanted, device, dtype)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise unloadable(str(error)[:300]) from None
    if dtype == torch.float32:
        # In fewer bits it would round elsewhere than the model's own code does.
        for method in {adapter.method.name: adapter.method for adapter in adapters}.values():
            method.quicken(whole)
    for module in whole.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
