"""Holds what a GPTQ folder says of its packed matrices against the tensors that it stores.

A server computes with what the configuration says: vLLM takes no notice of `g_idx` where that says `desc_act: false`,
nor of zero points where it says `sym: true`, and looks for packed tensors where no rule says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.backends.gptq.bit_unpacking import CHECKPOINT_FORMATS
from exporter.backends.gptq.names import WORD_BITS
from exporter.backends.gptq.plan import is_quantized
from exporter.backends.gptq.vllm_rules import served_together
from exporter.backends.model_folder.weight_reader import Shards
from exporter.backends.weight_reader import StoredWeight, named_faults
from exporter.families.roles import fused_modules, module_of
from exporter.merge.model import MergedModel

OLDER = "quantize_config.json"
_HEAD = "lm_head"
# What readers take from the configuration, with what they take where it says nothing. Its other keys say how the codes
# were found.
_READ: Mapping[str, Any] = {
    "quant_method": "gptq", "bits": None, "group_size": None, "sym": None, "desc_act": None, "lm_head": False,
    "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": None,
}  # fmt: skip
# What a rule may change.
_TYPES = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}


@dataclass(frozen=True)
class Settings:
    """What a configuration says of one matrix.

    Attributes:
        bits: bits of a code.
        group_size: input columns that share a scale; -1 for all.
        sym: whether every zero point is the middle of the codes.
        desc_act: whether columns may be grouped in any order.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


def stated_faults(
    folder: Path, config: Mapping[str, Any], model: MergedModel, shards: Shards, weights: Mapping[str, StoredWeight]
) -> Iterator[str]:
    """What the configuration says otherwise than the stored tensors, in words.

    Args:
        folder: the model folder.
        config: `quantization_config` of its config.json; bits and group size are numbers.
        model: the merged model.
        shards: the folder's tensors.
        weights: those that could be read, by the merged tensor's name.
    """
    yield from _older_faults(folder / OLDER, config)
    values = list(_value_faults(config))
    yield from values
    if values:
        return
    rules = config.get("dynamic") or {}
    settings = Settings(int(config["bits"]), int(config["group_size"]), config["sym"], config["desc_act"])
    packed = {name.removesuffix(".qweight") for name in shards.tensors if name.endswith(".qweight")}
    linear = [module_of(tensor.name) for tensor in model.tensors if is_quantized(tensor)]
    found = {module: settings_of(module, settings, rules) for module in linear}
    yield from _head_faults(config, packed)
    yield from _packing_faults(found, packed, {module for module in linear if f"{module}.weight" in shards.tensors})
    yield from _group_faults(found, settings, rules)
    stated = [
        _Matrix(module, weights[f"{module}.weight"], one)
        for module, one in found.items()
        if one is not None and module in packed and f"{module}.weight" in weights
    ]
    yield from named_faults([fault for matrix in stated if (fault := matrix.unlike())])
    alike = [matrix for matrix in stated if not matrix.unlike()]
    yield from _order_faults(alike, shards, static=_static_groups(config))
    yield from _zero_faults(alike, shards, str(_checkpoint_format(config)))


def settings_of(module: str, settings: Settings, rules: Mapping[str, Any]) -> Settings | None:
    """What a configuration says of one module; None if it stays in 16 bits.

    The first rule that matches counts, from the start of the name on (vLLM's get_dynamic_override in
    model_executor/layers/quantization/utils/gptq_utils.py, and GPTQModel's _resolve_dynamic_override).

    Args:
        module: its name.
        settings: what holds where no rule does.
        rules: `dynamic`.
    """
    for pattern, rule in rules.items():
        if re.match(re.sub(r"^[-+]:", "", pattern), module):
            if pattern.startswith("-:"):
                return None
            return replace(settings, **{key: rule[key] for key in _TYPES if key in rule})
    return settings


# --- the configuration by itself -------------------------------------------------------------------------------------


def _older_faults(file: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What the file for older readers says otherwise, where there is one."""
    if not file.is_file():
        return
    try:
        older = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        yield f"{file.name} is not readable: {error}"
        return
    for key, default in _READ.items():
        one, other = older.get(key, default), config.get(key, default)
        if one != other:
            yield f"{file.name}: {key} is {json.dumps(one)} and {json.dumps(other)} in config.json"


def _value_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Values that no reader takes."""
    wanted: dict[str, Sequence[Any]] = {
        "quant_method": ("gptq",), "sym": (True, False), "desc_act": (True, False), "pack_dtype": ("int32",),
        "checkpoint_format": CHECKPOINT_FORMATS, "lm_head": (True, False),
    }  # fmt: skip
    for key, values in wanted.items():
        # transformers and vLLM know a quantized folder by its method: it must be said.
        found = config.get(key, None if key == "quant_method" else _READ[key])
        if key == "checkpoint_format":
            found = _checkpoint_format(config)
        if not any(type(found) is type(value) and found == value for value in values):
            yield f"{_place(key)} is {_shown(found)} and should be {' or '.join(map(_shown, values))}"
    # GPTQModel writes both names of these.
    for key, other in (("format", "checkpoint_format"), ("method", "quant_method")):
        if config.get(key) is not None and config[key] != config.get(other, config[key]):
            yield f"{_place(key)} is {_shown(config[key])} and {other} is {_shown(config[other])}"
    yield from _rule_faults(config.get("dynamic"))


def _rule_faults(rules: Any) -> Iterator[str]:
    if rules is not None and not isinstance(rules, dict):
        yield f"{_place('dynamic')} is {_shown(rules)[:60]} and should be rules by pattern"
        return
    for pattern, rule in (rules or {}).items():
        try:
            re.compile(re.sub(r"^[-+]:", "", pattern))
        except re.error as error:
            yield f"{_place('dynamic')}: {pattern[:60]!r} is no regular expression: {error}"
        if not isinstance(rule, dict) or any(type(rule[key]) is not _TYPES[key] for key in rule.keys() & _TYPES.keys()):
            yield f"{_place('dynamic')}: {pattern[:60]!r} is {_shown(rule)[:60]} and should be settings"


# --- which matrices are packed ---------------------------------------------------------------------------------------


def _head_faults(config: Mapping[str, Any], packed: set[str]) -> Iterator[str]:
    said = bool(config.get("lm_head", False))
    if said != (_HEAD in packed):
        yield f"{_place('lm_head')} is {_shown(said)}, and {_HEAD} is {'packed' if _HEAD in packed else 'not packed'}"


def _packing_faults(found: Mapping[str, Settings | None], packed: set[str], kept: set[str]) -> Iterator[str]:
    """Matrices that are packed and should not be, and the reverse; `kept` are those in 16 bits."""
    rules = _place("dynamic")
    yield from named_faults(
        [f"{module} is packed, and {rules} keeps it in 16 bits" for module in found
         if found[module] is None and module in packed]
    )  # fmt: skip
    yield from named_faults(
        [f"{module} is in 16 bits and should be packed: no rule of {rules} keeps it so" for module in found
         if found[module] is not None and module in kept and module not in packed]
    )  # fmt: skip
    others = sorted(packed - found.keys() - {_HEAD})
    yield from named_faults([f"{module} is packed, and is no matrix of a decoder layer" for module in others])
    if not packed & found.keys():
        yield "no matrix of a decoder layer is packed"


def _group_faults(found: Mapping[str, Settings | None], settings: Settings, rules: Mapping[str, Any]) -> Iterator[str]:
    """Matrices that vLLM makes one of, and of which the rules do not say the same under all of their names."""
    faults = []
    for group in served_together(f"{module}.weight" for module in found):
        modules = [module_of(name) for name in group]
        named = {module: settings_of(module, settings, rules) for module in (*modules, *fused_modules(group))}
        other = next((module for module, one in named.items() if one != named[modules[0]]), None)
        if other is not None:
            faults.append(
                f"{_place('dynamic')} says other things of {modules[0]} than of {other}, of which vLLM makes one"
            )
    yield from named_faults(faults)


# --- what the packed tensors say -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """One packed matrix that could be read, and what is said of it."""

    module: str
    weight: StoredWeight
    said: Settings

    @property
    def bits(self) -> int:
        return int(self.weight.type.removeprefix("INT"))

    @property
    def groups(self) -> int:
        return self.weight.shape[1] // self.weight.group

    def unlike(self) -> str | None:
        """Bits and groups that are other ones than is said."""
        wanted = 1 if self.said.group_size < 1 else self.weight.shape[1] // self.said.group_size
        if (self.bits, self.groups) == (self.said.bits, wanted):
            return None
        found = f"{self.module} has {self.bits} bits in {self.groups} groups"
        return f"{found} and should have {self.said.bits} in {wanted}, by config.json"


def _order_faults(matrices: Sequence[_Matrix], shards: Shards, *, static: bool) -> Iterator[str]:
    """Columns that are not grouped in their order where they should be, and the reverse.

    Args:
        matrices: all of them.
        shards: the folder's tensors.
        static: whether groups were fixed before columns were put in another order, which leaves them in order.
    """
    place = _place("desc_act")
    several = [matrix for matrix in matrices if matrix.groups > 1]
    ordered = {matrix.module: _in_order(matrix, shards) for matrix in several}
    yield from named_faults(
        [f"{matrix.module}.g_idx does not number groups in order, and {place} is false" for matrix in several
         if not matrix.said.desc_act and not ordered[matrix.module]]
    )  # fmt: skip
    free = [matrix for matrix in several if matrix.said.desc_act]
    if free and not static and all(ordered[matrix.module] for matrix in free):
        yield f"{place} is true, and every g_idx numbers groups in order"


def _in_order(matrix: _Matrix, shards: Shards) -> bool:
    name, columns = f"{matrix.module}.g_idx", matrix.weight.shape[1]
    if name not in shards.tensors:
        return True
    if shards.tensors[name].shape != (columns,):
        return False
    found = shards.read(name, slice(0, None)).numpy()
    return np.array_equal(found, np.arange(columns) // matrix.weight.group)


def _zero_faults(matrices: Sequence[_Matrix], shards: Shards, checkpoint_format: str) -> Iterator[str]:
    """Zero points that are not in the middle where they should be, and the reverse."""
    place = _place("sym")
    middle = {matrix.module: _in_the_middle(matrix, shards, checkpoint_format) for matrix in matrices}
    yield from named_faults(
        [f"{matrix.module} has zero points beside the middle, and {place} is true" for matrix in matrices
         if matrix.said.sym and not middle[matrix.module]]
    )  # fmt: skip
    free = [matrix for matrix in matrices if not matrix.said.sym]
    if free and all(middle[matrix.module] for matrix in free):
        yield f"{place} is false, and every zero point is in the middle"


def _in_the_middle(matrix: _Matrix, shards: Shards, checkpoint_format: str) -> bool:
    """Whether every zero point is 2^(bits - 1); what is stored of it is one less in the first format."""
    bits = matrix.bits
    code = 2 ** (bits - 1) - (checkpoint_format == "gptq")
    stream = sum(code << bits * place for place in range(WORD_BITS))
    words = np.frombuffer(stream.to_bytes(bits * WORD_BITS // 8, "little"), dtype="<i4")
    found = shards.read(f"{matrix.module}.qzeros", slice(0, None)).numpy()
    return bool((found == np.resize(words, found.shape[1])).all())


def _checkpoint_format(config: Mapping[str, Any]) -> Any:
    return config.get("checkpoint_format") or config.get("format") or _READ["checkpoint_format"]


def _static_groups(config: Mapping[str, Any]) -> bool:
    """Whether it says so: GPTQModel does under `meta`."""
    meta = config.get("meta")
    return bool(config.get("static_groups") or (isinstance(meta, dict) and meta.get("static_groups")))


def _place(key: str) -> str:
    return f"config.json: quantization_config.{key}"


def _shown(value: Any) -> str:
    return "missing" if value is None else json.dumps(value)
