"""The model's own code from transformers, without weights: layers get theirs one at a time.

Masks, positions and rotary embeddings are the model's business. Its forward is run once for each length of window with
recorders in the place of the layers, which note the arguments that each layer is called with; a layer is then called
with those and the hidden states.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
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
        if adapters and model.adapters:
            whole = _with_adapters(whole, model.adapters, device, dtype)
        whole.eval().requires_grad_(False)
        self._whole = whole
        self._decoder: Any = whole.get_decoder()
        _buffers_to(whole, device)
        self._layers: list[nn.Module] = list(self._decoder.layers)
        self._prefix = next(name for name, module in whole.named_modules() if module is self._decoder.layers)
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


def _with_adapters(whole: Any, adapters: tuple[Adapter, ...], device: str, dtype: torch.dtype) -> Any:
    """Attach every adapter with peft, active and unmerged."""
    from peft import PeftModel

    names = [f"adapter_{index}" for index in range(len(adapters))]
    options: dict[str, Any] = {"low_cpu_mem_usage": True, "torch_device": device}
    try:
        with warnings.catch_warnings(), _without_quantizers():
            # peft warns about tied embeddings; here the adapter is never merged into them.
            warnings.simplefilter("ignore")
            wrapped: Any = PeftModel.from_pretrained(whole, adapters[0].folder, adapter_name=names[0], **options)
            for name, adapter in zip(names[1:], adapters[1:], strict=True):
                wrapped.load_adapter(str(adapter.folder), adapter_name=name, **options)
            wrapped.base_model.set_adapter(names)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RuntimeScoreError(
            "reference", found=str(error)[:300], expected="an adapter that peft loads", remedy="Check the adapter."
        ) from None
    for name, adapter in zip(names, adapters, strict=True):
        _load_adapter(wrapped, name, adapter, device, dtype)
    if dtype == torch.float32:
        # In fewer bits it would round elsewhere than the model's own code does.
        _add_in_products(wrapped)
    return wrapped.get_base_model()


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
    before: list[tuple[Any, str, Any]] = []
    for key, module in list(sys.modules.items()):
        for name in ("is_gptqmodel_available", "is_torchao_available"):
            if key.startswith("peft.") and hasattr(module, name):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, lambda: False)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _load_adapter(wrapped: Any, name: str, adapter: Adapter, device: str, dtype: torch.dtype) -> None:
    """Give an adapter its weights: peft moves them to the device of the base's weights, which have none."""
    from peft.utils import load_peft_weights

    stored = load_peft_weights(str(adapter.folder), device="cpu")
    for path, module in wrapped.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            place = f"{path}.{leaf}"
            if f".{name}" not in place:
                continue
            value = stored.get(place.replace(f".{name}", ""))
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
