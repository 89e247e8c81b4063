"""Binds the updates of an adapter to the tensors of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from exporter.adapters.adapter import Adapter
from exporter.adapters.base import CONFIG_NAME, Update, malformed
from exporter.errors import AdapterError, AdapterShapeError, AdapterTargetError, ArchitectureMismatchError
from exporter.families.roles import EMBEDDING, HEAD, weight_of
from exporter.inputs.checkpoint import Checkpoint


def bind(adapter: Adapter, base: Checkpoint) -> dict[str, Update]:
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
    if base.config.get("tie_word_embeddings") and EMBEDDING in shapes:
        shapes.setdefault(HEAD, shapes[EMBEDDING])
    targets = {weight_of(module): update for module, update in adapter.updates.items()}
    missing = [name for name in targets if name not in shapes]
    if missing:
        raise _no_target(adapter, missing, len(targets), shapes)
    wrong = [name for name, update in targets.items() if not _fits(update, shapes[name])]
    if wrong:
        name, update = wrong[0], targets[wrong[0]]
        hint = f" ({len(wrong)} of {len(targets)} targets do not fit)" if len(wrong) > 1 else ""
        raise AdapterShapeError(
            update.tensors[0].name,
            found=f"an update of shape {_named(update.shape)}{hint}",
            expected=f"{list(shapes[name])}, the shape of {name}",
            remedy="The adapter was trained on a base of another size: give the base it was trained on.",
        )
    _check_completeness(adapter, targets, base)
    return targets


def _named(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _fits(update: Update, shape: tuple[int, ...]) -> bool:
    own = update.shape
    return len(own) == len(shape) and all(size in (None, base) for size, base in zip(own, shape, strict=True))


def _check_architecture(adapter: Adapter, base: Checkpoint) -> None:
    mapping = adapter.config.get("auto_mapping") or {}
    if not isinstance(mapping, dict):
        raise malformed("auto_mapping", mapping, "a mapping")
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
    tensor = adapter.updates[name.removesuffix(".weight")].tensors[0].name
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


def _check_completeness(adapter: Adapter, targets: Mapping[str, Update], base: Checkpoint) -> None:
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
