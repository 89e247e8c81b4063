"""The metadata of a GGUF file but for the tokenizer: what llama.cpp's converter writes for a Qwen.

Keys and their order follow conversion/base.py (`TextModel.set_gguf_parameters`) of the release inside
llama-cpp-python 0.3.36. What this writes differently is listed in docs/formats.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import yaml

from exporter.backends.gguf.file_types import FileType
from exporter.backends.gguf.header import Value
from exporter.backends.output_plan import TensorPlan
from exporter.errors import UnsupportedModelError
from exporter.families.base import Family, number
from exporter.inputs.checkpoint import read_json
from exporter.merge.model import MergedModel

# What transformers takes where a configuration says nothing.
DEFAULT_ROPE_THETA = 10000.0

# Sampling defaults: key in generation_config.json → key and type in GGUF (gguf.Keys.General.SAMPLING_*).
_SAMPLING = {
    "top_k": ("top_k", "int32"),
    "top_p": ("top_p", "float32"),
    "min_p": ("min_p", "float32"),
    "temperature": ("temp", "float32"),
    "repetition_penalty": ("penalty_repeat", "float32"),
}


@dataclass(frozen=True)
class ParameterCount:
    """Elements of a file's tensors, as llama.cpp's converter counts them for the size label.

    Attributes:
        total: of all tensors.
        each_expert: of one expert in all layers; 0 in a dense model.
        experts: number of experts of a layer.
    """

    total: int
    each_expert: int = 0
    experts: int = 0

    @classmethod
    def of(cls, tensors: Sequence[TensorPlan]) -> ParameterCount:
        """Of a file's tensors; experts are in stacks."""
        stacks = [tensor for tensor in tensors if len(tensor.pieces) > 1]
        return cls(
            total=sum(tensor.rows * tensor.columns for tensor in tensors),
            each_expert=sum(tensor.rows * tensor.columns // len(tensor.pieces) for tensor in stacks),
            experts=len(stacks[0].pieces) if stacks else 0,
        )

    @property
    def size_label(self) -> str:
        """Such as `0.6B` or `128x1.8B`."""
        shared = self.total - self.each_expert * self.experts
        label: str = gguf.size_label(self.total, shared, self.each_expert, self.experts)
        return label


def model_metadata(
    model: MergedModel, family: Family, file_type: FileType, parameters: ParameterCount
) -> dict[str, Value]:
    """The `general.*` and `<architecture>.*` keys, in the converter's order.

    Args:
        model: the merged model.
        family: its family.
        file_type: the file type that is written.
        parameters: elements of all stored tensors, for the size label.
    """
    return {
        "general.architecture": Value("string", family.gguf.architecture),
        "general.type": Value("string", "model"),
        **_sampling(model.base.folder),
        **_naming(model, parameters),
        **_hyperparameters(family.text(model.config), family),
        "general.file_type": Value("uint32", file_type.number),
        "general.quantization_version": Value("uint32", int(gguf.GGML_QUANT_VERSION)),
    }


def _sampling(folder: Path) -> dict[str, Value]:
    if not (folder / "generation_config.json").is_file():
        return {}
    config = read_json(folder / "generation_config.json")
    found = {}
    for source, (key, kind) in _SAMPLING.items():
        if isinstance(config.get(source), int | float):
            found[f"general.sampling.{key}"] = Value(kind, config[source])
    return found


def _naming(model: MergedModel, parameters: ParameterCount) -> dict[str, Value]:
    """Name, its parts by gguf's own heuristic, size label, and the license from the base's model card."""
    logging.getLogger("metadata").setLevel(logging.CRITICAL)
    try:
        card = gguf.Metadata.load_model_card(model.base.folder)
    except (yaml.YAMLError, UnicodeDecodeError):
        # The card is prose for people; a damaged one says nothing about the model.
        card = {}
    kept = {key: card[key] for key in ("license", "license_name", "license_link", "tags", "language") if key in card}
    named = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), kept, {}, Path(model.name), parameters.total)
    values = {
        "name": named.name or model.name,
        "version": named.version,
        "organization": named.organization,
        "finetune": named.finetune,
        "basename": named.basename,
        "size_label": named.size_label or parameters.size_label,
        "license": ",".join(named.license) if isinstance(named.license, list) else named.license,
        "license.name": named.license_name,
        "license.link": named.license_link,
    }
    found = {f"general.{key}": Value("string", text) for key, text in values.items() if text is not None}
    for key, texts in (("tags", named.tags), ("languages", named.languages)):
        if texts:
            found[f"general.{key}"] = Value("[string]", texts)
    return found


def _hyperparameters(config: Mapping[str, Any], family: Family) -> dict[str, Value]:
    architecture, heads = family.gguf.architecture, number(config, "num_attention_heads")
    sizes = {
        "block_count": number(config, "num_hidden_layers"),
        "context_length": number(config, "max_position_embeddings"),
        "embedding_length": number(config, "hidden_size"),
        "feed_forward_length": number(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": number(config, "num_key_value_heads", heads),
    }
    found = {f"{architecture}.{key}": Value("uint32", size) for key, size in sizes.items()}
    found |= {f"{architecture}.rope.{key}": value for key, value in rope_metadata(config).items()}
    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float):
        raise UnsupportedModelError(
            "config.json: rms_norm_eps", found=repr(epsilon), expected="a number", remedy="Fetch the base again."
        )
    found[f"{architecture}.attention.layer_norm_rms_epsilon"] = Value("float32", epsilon)
    if config.get("head_dim") is not None:
        found[f"{architecture}.attention.key_length"] = Value("uint32", number(config, "head_dim"))
        found[f"{architecture}.attention.value_length"] = Value("uint32", number(config, "head_dim"))
    own = {key: family.size(config, name) for key, name in family.gguf.keys}
    return found | {f"{architecture}.{key}": Value("uint32", size) for key, size in own.items()}


def rope_metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Raises:
        UnsupportedModelError: a kind of scaling that GGUF has no words for, or sliding-window attention, which
            llama.cpp does not apply to these families.
    """
    if config.get("use_sliding_window") and config.get("sliding_window"):
        raise UnsupportedModelError(
            "config.json: use_sliding_window",
            found="true",
            expected="false: llama.cpp attends to everything in this family",
            remedy="Export to safetensors.",
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _unsupported_rope("rope_parameters", rope, "one mapping for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "yarn"):
        raise _unsupported_rope("rope_type", kind, "default, linear or yarn")
    found: dict[str, Value] = {}
    if kind != "default":
        found["scaling.type"] = Value("string", kind)
        found["scaling.factor"] = Value("float32", _rope_number(rope, "factor"))
    if kind == "yarn":
        found |= _yarn(rope, config)
    theta = rope if "rope_theta" in rope else {"rope_theta": config.get("rope_theta", DEFAULT_ROPE_THETA)}
    found["freq_base"] = Value("float32", _rope_number(theta, "rope_theta"))
    return found


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Value]:
    """YaRN's own settings (Peng et al. 2023, section 3.4)."""
    if rope.get("attention_factor") is not None:
        # llama.cpp computes it, 0.1 ln(factor) + 1, and takes no other.
        usual = 0.1 * math.log(_rope_number(rope, "factor")) + 1
        if not math.isclose(_rope_number(rope, "attention_factor"), usual, rel_tol=1e-4):
            raise _unsupported_rope("attention_factor", rope["attention_factor"], f"{usual:.6g}, which llama.cpp uses")
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    found = {"scaling.original_context_length": Value("uint32", int(original or config["max_position_embeddings"]))}
    optional = {
        "extrapolation_factor": "yarn_ext_factor",
        "attention_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    for source, key in optional.items():
        if rope.get(source) is not None:
            found[f"scaling.{key}"] = Value("float32", _rope_number(rope, source))
    return found


def _rope_number(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _unsupported_rope(key, value, "a positive number")
    return float(value)


def _unsupported_rope(key: str, found: Any, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: rope: {key}", found=repr(found)[:80], expected=expected, remedy="Export to safetensors."
    )
