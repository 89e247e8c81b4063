"""Holds what a GGUF header says of the model against the files that it was made from.

A wrong epsilon may change no more than rounding does: what can be compared is not measured. Keys are those of the
specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from exporter.backends.gguf.metadata.tokenizer_keys_check import PREFIX, piece_faults, shown, tokenizer_values
from exporter.families.base import Family
from exporter.inputs.checkpoint import read_json
from exporter.merge.model import MergedModel
from exporter.tokens.end_tokens import GENERATION_CONFIG

# Keys of the architecture's own, and what they are in config.json; what this does not have, the header must not.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# YaRN's, and what they are in `rope_parameters`.
_YARN = {
    "yarn_ext_factor": "extrapolation_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Defaults of sampling, which llama.cpp takes from the header, and what they are in generation_config.json.
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
_SAMPLING_PREFIX = "general.sampling."
# Lists of the tokenizer, which are compared piece by piece.
_LISTS = frozenset(f"{PREFIX}{key}" for key in ("tokens", "token_type", "merges"))


def header_faults(metadata: Mapping[str, Any], model: MergedModel, family: Family) -> Iterator[str]:
    """What a header says otherwise than configuration, sampling defaults and tokenizer, in words.

    Args:
        metadata: what the header says, by key.
        model: the merged model.
        family: its family.
    """
    architecture = f"{family.gguf.architecture}."
    definition = model.tokenizer.definition()
    stated = {"general.architecture": family.gguf.architecture, "general.type": "model"}
    stated |= {
        f"{architecture}{key}": value for key, value in _hyperparameters(family.text(model.config), family).items()
    }
    stated |= _sampling(model)
    stated |= tokenizer_values(model, definition)
    # A runtime may act on a key that the model has no value for.
    acted_on = (architecture, _SAMPLING_PREFIX, "tokenizer.")
    others = [key for key in metadata if key.startswith(acted_on) and key not in stated and key not in _LISTS]
    for key, wanted in {**stated, **dict.fromkeys(others)}.items():
        found = metadata.get(key)
        if not _same(found, wanted):
            yield f"{key} is {shown(found)} and should be {shown(wanted)}"
    yield from piece_faults(metadata, model, definition)


def _hyperparameters(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = config.get("num_attention_heads")
    return {key: config.get(source) for key, source in _SIZES.items()} | {
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        # What transformers takes where nothing is said.
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rope.scaling.type": None if kind == "default" else kind,
        "rope.scaling.factor": None if kind == "default" else rope.get("factor"),
        **(_yarn(rope, config) if kind == "yarn" else {}),
        **{key: family.size(config, name) for key, name in family.gguf.keys},
    }


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    original = rope.get(key) or config.get(key) or config.get("max_position_embeddings")
    return {"rope.scaling.original_context_length": original} | {
        f"rope.scaling.{name}": rope.get(source) for name, source in _YARN.items()
    }


def _sampling(model: MergedModel) -> dict[str, Any]:
    file = model.base.folder / GENERATION_CONFIG
    config = read_json(file) if file.is_file() else {}
    values = {name: config.get(source) for name, source in _SAMPLING.items()}
    return {
        f"{_SAMPLING_PREFIX}{name}": value if isinstance(value, int | float) else None for name, value in values.items()
    }


def _same(found: Any, wanted: Any) -> bool:
    """Whether a value is the one wanted; numbers as float32, which is what a header has."""
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(wanted, float) and isinstance(found, int | float):
        return bool(np.float32(found) == np.float32(wanted))
    return bool(found == wanted)
