"""Adapters beside the layers of the model's own code, unmerged."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from exporter.adapters.adapter import Adapter
from exporter.errors import RuntimeScoreError


def linear_layers(layers: nn.Module) -> list[str]:
    """The paths of all linear layers."""
    return [path for path, module in layers.named_modules() if isinstance(module, nn.Linear)]


def attach(
    whole: nn.Module, adapters: Sequence[Adapter], linear: Collection[str], device: str, dtype: torch.dtype
) -> None:
    """Put every adapter beside the linear layers that it changes, with peft: active and unmerged.

    Args:
        whole: the model.
        adapters: the adapters.
        linear: names of the layers that they may be beside.
        device: where their weights go.
        dtype: what those are turned into.

    Raises:
        RuntimeScoreError: peft cannot do it, or did something else.
    """
    from peft import PeftConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [f"adapter_{index}" for index in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        wanted = {module for module in adapter.updates if module in linear}
        if not wanted:
            continue
        # peft takes the layers from keys, and of the values nothing.
        keys: dict[str, Any] = {f"{module}.lora_A.weight": None for module in wanted}
        try:
            with warnings.catch_warnings(), _without_quantizers(), _without_conversion():
                # peft warns where its configuration names more layers, which the plan has refused or which are merged.
                warnings.simplefilter("ignore")
                config = PeftConfig.from_pretrained(str(adapter.folder))
                inject_adapter_in_model(config, whole, name, low_cpu_mem_usage=True, state_dict=keys)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise _unloadable(str(error)[:300]) from None
        attached = {path for path, module in whole.named_modules() if name in getattr(module, "lora_A", ())}
        if attached != wanted:
            some = sorted(attached ^ wanted)
            raise _unloadable(f"{len(attached)} layers with an adapter, not {len(wanted)}; {some[0]} is one of them")
        _load_adapter(whole, name, adapter, device, dtype)
    if dtype == torch.float32:
        # In fewer bits it would round elsewhere than the model's own code does.
        _add_in_products(whole)
    for module in whole.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)


def _unloadable(found: str) -> RuntimeScoreError:
    return RuntimeScoreError(
        "reference", found=found, expected="an adapter that peft loads", remedy="Check the adapter."
    )


def _add_in_products(wrapped: nn.Module) -> None:
    """Let the adapters' last products add to the base's outputs in place.

    peft's own forward makes the product, a scaled copy and the sum, each as wide as the output: a seventh of a walk.
    What is not its plain linear layer keeps its own.
    """
    from peft.tuners.lora import Linear

    for layer in wrapped.modules():
        if isinstance(layer, Linear) and not layer.lora_variant and not any(layer.lora_bias.values()):
            layer.forward = partial(_linear_beside, layer)


def _linear_beside(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """W x + bias + scaling · B (A x), summed over the active adapters."""
    output: torch.Tensor = layer.base_layer(hidden)
    inputs, outputs = hidden.flatten(0, -2), output.view(-1, output.shape[-1])
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            outputs.addmm_(inputs @ a.T, b.T, alpha=layer.scaling[name])
    return output


@contextmanager
def _without_quantizers() -> Iterator[None]:
    """Let peft believe that GPTQModel and torchao are not installed: it would import them, in 5 s, 250 MB and a few
    lines on the screen, for layers that are not here."""
    names = ("is_gptqmodel_available", "is_torchao_available")
    modules = [module for key, module in sys.modules.items() if key.startswith("peft.")]
    with ExitStack() as stack:
        for module, name in product(modules, names):
            if hasattr(module, name):
                stack.enter_context(_replaced(module, name, lambda: False))
        yield


def _without_conversion() -> AbstractContextManager[None]:
    """Let peft leave its configuration as it is. For transformers' fused experts it would turn the projections into
    parameters of those, and no longer find them in dense layers either; here experts have a layer a matrix."""
    from peft.utils import transformers_weight_conversion as module

    return _replaced(module, "convert_peft_config_for_transformers", lambda *_args, **_options: None)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module with another value, for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _load_adapter(whole: nn.Module, name: str, adapter: Adapter, device: str, dtype: torch.dtype) -> None:
    """Give an adapter its weights, on the device and in the dtype of what it is beside."""
    from peft.utils import load_peft_weights

    stored = load_peft_weights(str(adapter.folder), device="cpu")
    for path, module in whole.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            place = f"{path}.{leaf}"
            if f".{name}" not in place:
                continue
            value = stored.get(f"base_model.model.{place.replace(f'.{name}', '')}")
            if value is None or value.shape != parameter.shape:
                raise RuntimeScoreError(
                    place, found="no value of its shape", expected="an adapter that peft loads",
                    remedy="Check the adapter.",
                )  # fmt: skip
            module._parameters[leaf] = nn.Parameter(value.to(device, dtype), requires_grad=False)
