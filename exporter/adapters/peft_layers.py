"""peft's own layers beside those of a model without weights, unmerged."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporter.errors import RuntimeScoreError
from exporter.inputs.checkpoint import StoredTensor

# What peft puts before the names of a model's modules in an adapter's file.
_FILE_PREFIX = "base_model.model."


def inject(
    whole: nn.Module,
    name: str,
    folder: Path,
    tensors: Mapping[str, Sequence[StoredTensor]],
    device: str,
    dtype: torch.dtype,
) -> None:
    """Put an adapter beside some layers with peft; see `AdapterMethod.attach`.

    Args:
        whole: the model.
        name: the adapter's name in it.
        folder: the adapter's folder.
        tensors: the tensors of its file, by the module that they change.
        device: where its weights go.
        dtype: what they are turned into.

    Raises:
        RuntimeScoreError: peft put it beside other layers, or the file lacks a weight that peft's layers have.
    """
    from peft import PeftConfig, inject_adapter_in_model

    # peft takes the layers from keys, and of the values nothing.
    names = [tensor.name for found in tensors.values() for tensor in found]
    keys: dict[str, Any] = {name.removeprefix(_FILE_PREFIX): None for name in names}
    with warnings.catch_warnings(), _without_quantizers(), _without_conversion():
        # peft warns where its configuration names more layers, which the plan has refused or which are merged.
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(folder))
        inject_adapter_in_model(config, whole, name, low_cpu_mem_usage=True, state_dict=keys)
    attached = _attached(whole, name)
    if attached != tensors.keys():
        some = sorted(attached ^ tensors.keys())
        raise unloadable(f"{len(attached)} layers with an adapter, not {len(tensors)}; {some[0]} is one of them")
    _load_adapter(whole, name, folder, device, dtype)


def unloadable(found: str) -> RuntimeScoreError:
    """The error of an adapter that cannot be put beside the model."""
    return RuntimeScoreError(
        "reference", found=found, expected="an adapter that peft loads", remedy="Check the adapter."
    )


def _attached(whole: nn.Module, name: str) -> set[str]:
    """The layers that an adapter of this name is beside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = ((path, module) for path, module in whole.named_modules() if isinstance(module, BaseTunerLayer))
    return {path for path, layer in layers if name in layer._get_available_adapters()}


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


def _load_adapter(whole: nn.Module, name: str, folder: Path, device: str, dtype: torch.dtype) -> None:
    """Give an adapter its weights, on the device and in the dtype of what it is beside."""
    from peft.utils import load_peft_weights

    stored = load_peft_weights(str(folder), device="cpu")
    for path, module in whole.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            place = f"{path}.{leaf}"
            if f".{name}" not in place:
                continue
            key = _FILE_PREFIX + place.replace(f".{name}", "")
            # Files of peft leave out `weight` where a vector has a module of its own.
            value = stored.get(key, stored.get(key.removesuffix(".weight")))
            if value is None or value.shape != parameter.shape:
                raise RuntimeScoreError(
                    place, found="no value of its shape", expected="an adapter that peft loads",
                    remedy="Check the adapter.",
                )  # fmt: skip
            module._parameters[leaf] = nn.Parameter(value.to(device, dtype), requires_grad=False)
