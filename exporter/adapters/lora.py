"""A PEFT LoRA adapter as updates per base tensor.

Follows peft's file format: `adapter_config.json` beside `adapter_model.safetensors`, whose names are
`base_model.model.<module>.lora_A.weight` (`lora_embedding_A` for an embedding). The scale is alpha / r (LoRA, Hu et al.
2021, section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). Nothing here is ever skipped: a tensor or a setting
that is not understood is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.adapters.base import CONFIG_NAME, AdapterMethod, RowInputs, Update, malformed, unsupported
from exporter.errors import AdapterError, AdapterRankError, AdapterTargetError, UnsupportedAdapterError
from exporter.inputs.checkpoint import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from exporter.inputs.row_blocks import RowBlock
    from exporter.inputs.tensor_reader import TensorReader

# Settings of peft's LoraConfig (0.21) that change what the adapter computes and are handled here.
HANDLED_SETTINGS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules",
    "task_type", "auto_mapping", "init_lora_weights", "bias",
})  # fmt: skip

# Settings that do not change what the trained adapter computes: provenance, selection, training, initialization.
NEUTRAL_SETTINGS = frozenset({
    "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "peft_version", "qalora_group_size", "runtime_config", "velora_config",
})  # fmt: skip

# Initializations that subtract something from the base: the adapter is then relative to another base than the file.
BASE_CHANGING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_LORA_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.weight)?$")
_COPY_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight$")


@dataclass(frozen=True)
class LowRankUpdate(Update):
    """One low-rank update: `W += scale * B @ A`, or `W += scale * (B @ A).T` for an embedding.

    Attributes:
        module: the module's name in the base, for example `model.layers.0.self_attn.q_proj`.
        a: float tensor of shape (rank, in_features), or (rank, vocabulary) for an embedding.
        b: float tensor of shape (out_features, rank), or (hidden, rank) for an embedding.
        scale: the factor of the product.
        transposed: True for an embedding.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """See `Update`."""
        out_features, in_features = self.b.shape[0], self.a.shape[1]
        return (in_features, out_features) if self.transposed else (out_features, in_features)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """See `Update`: A, then B."""
        return (self.a, self.b)

    def read_whole(self, reader: TensorReader, source: StoredTensor) -> tuple[torch.Tensor, ...]:
        """See `Update`: A, shape (rank, in_features); or for an embedding B, shape (hidden, rank)."""
        from exporter.inputs.row_blocks import read_tensor

        return (read_tensor(reader, self.b if self.transposed else self.a),)

    def read_rows(self, reader: TensorReader, block: RowBlock) -> tuple[torch.Tensor, ...]:
        """See `Update`: the rows of the product's left factor, shape (block.count, rank)."""
        from exporter.adapters.lora_rows import read_left_rows

        left = self.a if self.transposed else self.b
        return (read_left_rows(reader, left, block, transposed=self.transposed),)

    def apply(self, rows: torch.Tensor, inputs: RowInputs) -> None:
        """See `Update`: adds the product, tile by tile."""
        from exporter.adapters.lora_rows import add_product

        right, left = inputs.whole[0], inputs.of_rows[0]
        add_product(rows, left, right.T if self.transposed else right, self.scale, inputs.tile_rows, inputs.workspace)

    def without_effect(self, peaks: Mapping[str, float]) -> str | None:
        """See `Update`: A, B or the scale is zero."""
        for tensor in self.tensors:
            if peaks[tensor.name] == 0.0:
                return tensor.name
        return f"{self.module}: the scale" if self.scale == 0.0 else None

    @property
    def whole_bytes(self) -> int:
        """See `Update`."""
        return 4 * self.rank * max(self.shape)

    @property
    def noise_terms(self) -> int:
        """See `Update`: an element of the product sums as many terms as its rank."""
        return self.rank


class LoraMethod(AdapterMethod):
    """LoRA and rsLoRA on linear layers and embeddings."""

    name = "lora"
    title = "LoRA"
    parts = "lora_A and lora_B"
    peft_type = "LORA"
    settings: ClassVar[frozenset[str]] = HANDLED_SETTINGS | NEUTRAL_SETTINGS

    def check_settings(self, folder: Path, config: Mapping[str, Any]) -> None:
        """See `AdapterMethod`."""
        if config.get("bias", "none") != "none":
            raise unsupported(f"{CONFIG_NAME}: bias", repr(config["bias"]), "'none'")
        initialization = config.get("init_lora_weights", True)
        if isinstance(initialization, str) and initialization.lower().startswith(BASE_CHANGING_INITIALIZATIONS):
            raise UnsupportedAdapterError(
                f"{CONFIG_NAME}: init_lora_weights",
                found=repr(initialization),
                expected="an initialization that leaves the base as it is",
                remedy="Convert it to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=…).",
            )
        super().check_settings(folder, config)

    def read(
        self, header: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Update], Mapping[str, StoredTensor]]:
        """See `AdapterMethod`: sorts the tensors into the parts of each module and whole copies."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        copies: dict[str, StoredTensor] = {}
        for name, tensor in header.items():
            if part := self.part_of(name):
                module, key = part
                if key in parts.get(module, {}):
                    raise AdapterError(
                        name,
                        found="the same part of an update twice",
                        expected="it once",
                        remedy="Save the adapter again.",
                    )
                parts.setdefault(module, {})[key] = tensor
            else:
                copies[_copied_module(name)] = tensor
        return {module: self.update(module, found, config) for module, found in parts.items()}, copies

    def part_of(self, name: str) -> tuple[str, str] | None:
        """The module that a tensor of the file belongs to, and which part of its update it is; None if it is none."""
        if match := _LORA_KEY.match(name):
            return match["module"], ("embedding_" if match["embedding"] else "") + match["part"]
        return None

    def update(self, module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Update:
        """Build the update of one module from the parts that `part_of` names.

        Raises:
            AdapterError: a part is missing, or one is there that does not belong to the others.
            AdapterRankError: the parts are not of the rank that the configuration gives.
        """
        return lora_update(module, parts, config)

    def summary(self, config: Mapping[str, Any], updates: Mapping[str, Update]) -> dict[str, Any]:
        """See `AdapterMethod`: with the ranks and the scales."""
        found = [update for update in updates.values() if isinstance(update, LowRankUpdate)]
        return {
            "method": "rslora" if config.get("use_rslora") else self.name,
            "ranks": sorted({update.rank for update in found}),
            "scales": sorted({update.scale for update in found}),
        }

    def quicken(self, whole: nn.Module) -> None:
        """See `AdapterMethod`: lets the adapters' last products add to the base's outputs in place.

        peft's own forward makes the product, a scaled copy and the sum, each as wide as the output: a seventh of a
        walk. What is not its plain linear layer keeps its own.
        """
        from peft.tuners.lora import Linear

        for layer in whole.modules():
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


def _copied_module(name: str) -> str:
    """The module whose whole weight a tensor of the file is; what is no such weight is refused by name."""
    if "lora_magnitude_vector" in name:
        raise unsupported(name, "a DoRA magnitude", "plain LoRA tensors")
    if "modules_to_save" in name:
        raise unsupported(name, "a wholly trained module", "plain LoRA tensors")
    if match := _COPY_KEY.match(name):
        return match["module"]
    raise AdapterTargetError(
        name,
        found="an adapter tensor of unknown kind",
        expected="base_model.model.<module>.lora_A.weight and the like",
        remedy="Save the adapter with peft.",
    )


def lora_update(module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> LowRankUpdate:
    """Build one update and check A, B and the configuration against each other."""
    transposed = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if transposed else ("A", "B")
    if parts.keys() != set(names):
        raise AdapterError(
            module,
            found=" and ".join(f"lora_{part}" for part in sorted(parts)),
            expected=" and ".join(f"lora_{part}" for part in names),
            remedy="The adapter file is incomplete: save it again.",
        )
    a, b = parts[names[0]], parts[names[1]]
    for tensor in (a, b):
        if tensor.dtype not in {"F32", "F16", "BF16"} or len(tensor.shape) != 2:
            raise unsupported(tensor.name, f"{tensor.dtype} {list(tensor.shape)}", "a matrix of F32, F16 or BF16")
    rank = _setting(config, "r", "rank_pattern", module)
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise AdapterRankError(
            module,
            found=f"A {list(a.shape)} and B {list(b.shape)}",
            expected=f"the rank {rank} of {CONFIG_NAME} in both",
            remedy="Tensors and configuration are not from one training run: save the adapter again.",
        )
    alpha = _setting(config, "lora_alpha", "alpha_pattern", module)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankUpdate(module, a, b, scale, transposed)


def _setting(config: Mapping[str, Any], key: str, pattern_key: str, module: str) -> float:
    """Rank or alpha of a module: by the first pattern that matches its name's end (peft's `get_pattern_key`)."""
    value, where = config.get(key, 8), key
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise malformed(pattern_key, patterns, "a mapping from patterns to numbers")
    for pattern, special in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            raise malformed(pattern_key, pattern, "a regular expression") from None
        if matches:
            value, where = special, pattern_key
            break
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (key == "r" and (value != int(value) or value < 1)):
        raise malformed(where, value, "a positive whole number" if key == "r" else "a finite number")
    result: float = value
    return result
