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
from pathlib import Path
from typing import Any

from exporter.adapters.base import CONFIG_NAME, malformed, unsupported
from exporter.errors import AdapterError, AdapterRankError, AdapterTargetError, UnsupportedAdapterError
from exporter.inputs.checkpoint import StoredTensor

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
class LowRankUpdate:
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
        """Shape of the weight that this update fits."""
        out_features, in_features = self.b.shape[0], self.a.shape[1]
        return (in_features, out_features) if self.transposed else (out_features, in_features)


def check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse by name every setting that would change what the adapter computes and is not handled."""
    if config.get("peft_type") != "LORA":
        raise unsupported(f"{CONFIG_NAME}: peft_type", repr(config.get("peft_type")), "'LORA'")
    if config.get("bias", "none") != "none":
        raise unsupported(f"{CONFIG_NAME}: bias", repr(config["bias"]), "'none'")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise unsupported(f"{CONFIG_NAME}: task_type", repr(config["task_type"]), "'CAUSAL_LM'")
    initialization = config.get("init_lora_weights", True)
    if isinstance(initialization, str) and initialization.lower().startswith(BASE_CHANGING_INITIALIZATIONS):
        raise UnsupportedAdapterError(
            f"{CONFIG_NAME}: init_lora_weights",
            found=repr(initialization),
            expected="an initialization that leaves the base as it is",
            remedy="Convert it to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=…).",
        )
    for name, value in config.items():
        if value and name not in HANDLED_SETTINGS and name not in NEUTRAL_SETTINGS:
            raise unsupported(f"{folder.name}/{CONFIG_NAME}: {name}", str(value)[:80], "it unset: not supported yet")


def sort_tensors(
    header: Mapping[str, StoredTensor],
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Sort the file's tensors into A/B pairs by module and whole copies; refuse the rest by name."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    copies: dict[str, StoredTensor] = {}
    for name, tensor in header.items():
        if match := _LORA_KEY.match(name):
            key = ("embedding_" if match["embedding"] else "") + match["part"]
            if key in pairs.get(match["module"], {}):
                raise AdapterError(
                    name, found="the same part of an update twice", expected="it once", remedy="Save the adapter again."
                )
            pairs.setdefault(match["module"], {})[key] = tensor
        elif "lora_magnitude_vector" in name:
            raise unsupported(name, "a DoRA magnitude", "plain LoRA tensors")
        elif "modules_to_save" in name:
            raise unsupported(name, "a wholly trained module", "plain LoRA tensors")
        elif match := _COPY_KEY.match(name):
            copies[match["module"]] = tensor
        else:
            raise AdapterTargetError(
                name,
                found="an adapter tensor of unknown kind",
                expected="base_model.model.<module>.lora_A.weight and the like",
                remedy="Save the adapter with peft.",
            )
    return pairs, copies


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
