"""The model's own code from transformers, without weights: layers get theirs one at a time.

Masks, positions and rotary embeddings are the model's business. Its forward is run once for each length of window with
recorders in the place of the layers, which note the arguments that each layer is called with; a layer is then called
with those and the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from exporter.errors import RuntimeScoreError
from exporter.families.roles import is_recomputed
from exporter.libraries.quiet import import_transformers
from exporter.merge.model import MergedModel
from exporter.tour.walk.adapters_beside import attach, linear_layers
from exporter.tour.walk.unfused_experts import unfuse

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
            linear = {f"{self._prefix}.{path}" for path in linear_layers(self._decoder.layers)}
            attach(whole, model.adapters, linear, device, dtype)
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
        stored = {name for name in names if not is_recomputed(name)}
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


def _buffers_to(whole: nn.Module, device: str) -> None:
    """Buffers are computed, not stored: they are real already and only move."""
    for module in whole.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
