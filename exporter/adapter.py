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
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint, StoredTensor, read_header, read_json
from exporter.errors import (
    AdapterError,
    AdapterRankError,
    AdapterShapeError,
    AdapterTargetError,
    ArchitectureMismatchError,
    MissingFileError,
    UnsupportedAdapterError,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

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


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that has been checked in itself; `bind` checks it against a base.

    Attributes:
        folder: the folder.
        config: `adapter_config.json` as read.
        updates: the updates by module name.
        copies: whole weights that peft saved beside the updates (embedding layers), by module name.
    """

    folder: Path
    config: Mapping[str, Any]
    updates: Mapping[str, LowRankUpdate]
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were read."""
        return (self.folder / CONFIG_NAME, self.folder / WEIGHTS_NAME)

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open an adapter folder. Reads the configuration and the header, and no weights.

        Raises:
            MissingFileError, UnsupportedAdapterError, AdapterRankError, AdapterTargetError: see each.
        """
        config = read_json(folder / CONFIG_NAME)
        _check_settings(folder, config)
        if not (folder / WEIGHTS_NAME).is_file():
            other = "adapter_model.bin" if (folder / "adapter_model.bin").is_file() else "no weights"
            raise MissingFileError(
                str(folder), found=other, expected=WEIGHTS_NAME, remedy="Save the adapter with safe serialization."
            )
        pairs, copies = _sort_tensors(read_header(folder / WEIGHTS_NAME))
        updates = {module: _update(module, parts, config) for module, parts in pairs.items()}
        if not updates:
            raise AdapterError(
                WEIGHTS_NAME,
                found="no LoRA tensor",
                expected="lora_A and lora_B of each target",
                remedy="Save it again.",
            )
        return cls(folder, config, updates, copies)


def _check_settings(folder: Path, config: Mapping[str, Any]) -> None:
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


def unsupported(thing: str, found: str, expected: str) -> UnsupportedAdapterError:
    """What is part of the adapter and is not merged here."""
    return UnsupportedAdapterError(
        thing, found=found, expected=expected, remedy="Merge it with peft and export the merged model as --base."
    )


def _sort_tensors(
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


def _update(module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> LowRankUpdate:
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
        raise _malformed(pattern_key, patterns, "a mapping from patterns to numbers")
    for pattern, special in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            raise _malformed(pattern_key, pattern, "a regular expression") from None
        if matches:
            value, where = special, pattern_key
            break
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (key == "r" and (value != int(value) or value < 1)):
        raise _malformed(where, value, "a positive whole number" if key == "r" else "a finite number")
    result: float = value
    return result


def _malformed(key: str, found: Any, expected: str) -> AdapterError:
    return AdapterError(
        f"{CONFIG_NAME}: {key}", found=repr(found)[:80], expected=expected, remedy="Save the adapter again."
    )


def bind(adapter: Adapter, base: Checkpoint) -> dict[str, LowRankUpdate]:
    """Check an adapter against a base and return its updates by base tensor name.

    `fan_in_fan_out` needs no branch of its own: peft resets it on `torch.nn.Linear` (lora/layer.py, dispatch_default),
    and every matrix of a Qwen is one. An update of the head of a tied model is returned as `lm_head.weight`.

    Raises:
        ArchitectureMismatchError: the adapter is for another class of models, or none of its targets exists.
        AdapterTargetError: a target has no base tensor, or the configuration's targets are not all in the file.
        AdapterShapeError: an update does not have exactly the shape of its base tensor.
    """
    _check_architecture(adapter, base)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    if base.config.get("tie_word_embeddings") and "model.embed_tokens.weight" in shapes:
        shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    targets = {f"{module}.weight": update for module, update in adapter.updates.items()}
    missing = [name for name in targets if name not in shapes]
    if missing:
        raise _no_target(adapter, missing, len(targets), shapes)
    wrong = [name for name, update in targets.items() if update.shape != shapes[name]]
    if wrong:
        name, update = wrong[0], targets[wrong[0]]
        hint = f" ({len(wrong)} of {len(targets)} targets do not fit)" if len(wrong) > 1 else ""
        raise AdapterShapeError(
            update.a.name,
            found=f"an update of shape {list(update.shape)}{hint}",
            expected=f"{list(shapes[name])}, the shape of {name}",
            remedy="The adapter was trained on a base of another size: give the base it was trained on.",
        )
    _check_completeness(adapter, targets, base)
    return targets


def _check_architecture(adapter: Adapter, base: Checkpoint) -> None:
    mapping = adapter.config.get("auto_mapping") or {}
    if not isinstance(mapping, dict):
        raise _malformed("auto_mapping", mapping, "a mapping")
    trained_on, architectures = mapping.get("base_model_class"), base.config.get("architectures") or []
    if trained_on and architectures and trained_on not in architectures:
        raise ArchitectureMismatchError(
            f"{CONFIG_NAME}: auto_mapping.base_model_class",
            found=trained_on,
            expected=" or ".join(architectures),
            remedy="Give the base that the adapter was trained on.",
        )


def _no_target(adapter: Adapter, missing: list[str], targets: int, shapes: Mapping[str, Any]) -> AdapterError:
    name = missing[0]
    tensor = adapter.updates[name.removesuffix(".weight")].a.name
    if len(missing) == targets:
        return ArchitectureMismatchError(
            tensor,
            found=f"{targets} targets such as {name}, none of which the base has",
            expected=f"names such as {next((n for n in shapes if 'proj' in n), next(iter(shapes)))}",
            remedy="The adapter was trained on another architecture: give the base it was trained on.",
        )
    close = get_close_matches(name, shapes, n=1)
    return AdapterTargetError(
        tensor,
        found=f"no base tensor {name}" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
        expected="a base tensor for every adapter tensor" + (f"; the nearest is {close[0]}" if close else ""),
        remedy="Give the base that the adapter was trained on.",
    )


def _check_completeness(adapter: Adapter, targets: Mapping[str, LowRankUpdate], base: Checkpoint) -> None:
    """Every base matrix that the configuration's targets call for must have its update in the file."""
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        if _called_for(adapter.config, module) and len(tensor.shape) == 2 and module != name and name not in targets:
            raise AdapterTargetError(
                name,
                found="no update in the adapter's file",
                expected=f"one, since {CONFIG_NAME} lists it among target_modules",
                remedy="The adapter file is incomplete: save it again.",
            )


def _called_for(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is among the targets (peft's `check_target_module_exists`)."""

    def among(names: Any) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names or ())

    if among(config.get("exclude_modules")) or not among(config.get("target_modules")):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(config.get("target_modules"), str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False
