"""The model's own code from transformers, without weights: layers get theirs one at a time.

Masks, positions and rotary embeddings are the model's business. Its forward is run once for each length of window with
recorders in the place of the layers, which note the arguments that each layer is called with; a layer is then called
with those and the hidden states.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import nn

from exporter.adapter import Adapter
from exporter.errors import RuntimeScoreError
from exporter.model import RECOMPUTED, MergedModel
from exporter.quiet import import_transformers
from exporter.tour.experts import unfuse

Arguments = Mapping[str, Any]


class Skeleton:
    """A causal language model whose parameters have no data.

    Attributes:
        merged: the tensors that an adapter changes and that it cannot be beside, as they are not those of linear layers
            (a router); their layers take the merged values.

    Args:
        model: the merged model; its configuration and, with `adapters`, its adapters are used.
        device: where the layers compute.
        dtype: what they compute in.
        adapters: attach the adapters beside the weights with peft, so that the layers take the base's values.

    Raises:
        RuntimeScoreError: transformers does not know the architecture, or peft cannot load an adapter.
    """

    def __init__(self, model: MergedModel, device: str, dtype: torch.dtype, *, adapters: bool) -> None:
        self.device, self.dtype = device, dtype
        whole = _without_weights(model, dtype)
        unfuse(whole, model.base.tensors)
        self._decoder: Any = whole.get_decoder()
        self._prefix = next(name for name, module in whole.named_modules() if module is self._decoder.layers)
        self.merged = frozenset[str]()
        if adapters and model.adapters:
            linear = {f"{self._prefix}.{path}" for path in _linear_layers(self._decoder.layers)}
            _attach(whole, model.adapters, linear, device, dtype)
            updated = {module for adapter in model.adapters for module in adapter.updates}
            self.merged = frozenset(f"{module}.weight" for module in updated - linear)
        whole.eval().requires_grad_(False)
        self._whole = whole
        _buffers_to(whole, device)
        self._layers: list[nn.Module] = list(self._decoder.layers)
        self._norm = self._decoder.norm
        self.norm_name = f"{next(name for name, module in whole.named_modules() if module is self._norm)}.weight"

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self._prefix}.{index}."

    def arguments(self, length: int) -> list[Arguments]:
        """What the model's forward calls each layer with for one window of `length` tokens, hidden states apart."""
        recorders = [_Recorder(layer) for layer in self._layers]
        self._decoder.layers = nn.ModuleList(recorders)
        hidden = torch.zeros(1, length, int(self._decoder.config.hidden_size), dtype=self.dtype, device=self.device)
        norm, self._decoder.norm = self._norm, nn.Identity()
        try:
            with torch.inference_mode():
                self._decoder(inputs_embeds=hidden, use_cache=False)
        finally:
            self._decoder.layers, self._decoder.norm = nn.ModuleList(self._layers), norm
        return [recorder.arguments for recorder in recorders]

    def slots(self, index: int) -> dict[str, tuple[nn.Module, str]]:
        """Where each of a layer's weights goes: by the checkpoint's name, the module and the name of its parameter."""
        found = {}
        for path, module in self._layers[index].named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta or hasattr(parameter, "_toured"):
                    name = ".".join(part for part in (path, leaf) if part).replace(".base_layer.", ".")
                    found[self.layer_prefix(index) + name] = (module, leaf)
        return found

    def check(self, index: int, names: set[str]) -> None:
        """Every weight of a layer must be in the checkpoint, and every tensor of the checkpoint must have a place.

        Raises:
            RuntimeScoreError: one has none.
        """
        wanted = self.slots(index).keys()
        stored = {name for name in names if not name.endswith(RECOMPUTED)}
        for problem, found in (("missing", sorted(wanted - stored)), ("unexpected", sorted(stored - wanted))):
            if found:
                raise RuntimeScoreError(
                    found[0],
                    found=f"{problem} (and {len(found) - 1} more)" if found[1:] else problem,
                    expected="the weights that the model's own code in transformers has",
                    remedy="Check the model's configuration against its weights.",
                )

    def install(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Give a layer its weights, by the checkpoint's names; they are used as they are, not copied."""
        for name, (module, leaf) in self.slots(index).items():
            if name in weights:
                parameter = nn.Parameter(weights[name], requires_grad=False)
                parameter._toured = True  # type: ignore[attr-defined]
                module._parameters[leaf] = parameter

    def strip(self, index: int) -> None:
        """Take a layer's weights away again."""
        for module, leaf in self.slots(index).values():
            held: Any = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)

    def modules(self, index: int) -> dict[str, nn.Module]:
        """The modules of a layer by the checkpoint's name of their `weight`."""
        return {name: module for name, (module, leaf) in self.slots(index).items() if leaf == "weight"}

    def forward(self, index: int, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """Send windows through one layer: (windows, tokens, hidden) to the same."""
        with torch.inference_mode():
            output = self._layers[index](hidden, **arguments)
        # Some layers return a tuple that begins with the hidden states.
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The model's final norm with the given weight."""
        self._norm.weight = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
        with torch.inference_mode():
            result: torch.Tensor = self._norm(hidden)
        return result


def import_code(model: MergedModel) -> None:
    """Import all that a skeleton of the model needs, which takes seconds.

    Raises:
        ImportError: a library is missing, or transformers does not know the kind of model.
    """
    import_transformers()
    if model.adapters:
        import_module("peft")
    kind = str(model.config.get("model_type"))
    import_module(f"transformers.models.{kind}.modeling_{kind}")


class _Recorder(nn.Module):
    """Stands in for a layer and notes what it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a list, so that it is no submodule of this one.
        self._layer = [layer]
        self.arguments: Arguments = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden


def _without_weights(model: MergedModel, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights

    transformers = import_transformers()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(model.base.folder)
        with init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeScoreError(
            "config.json", found=str(error)[:300], expected="a model that transformers knows", remedy="Check the model."
        ) from None


def _linear_layers(layers: nn.Module) -> list[str]:
    return [path for path, module in layers.named_modules() if isinstance(module, nn.Linear)]


def _attach(
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


def _buffers_to(whole: nn.Module, device: str) -> None:
    """Buffers are computed, not stored: they are real already and only move."""
    for module in whole.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
