"""Holds what a GGUF header says of the model and its tokenizer against the files that it was made from.

A wrong epsilon or merge may change no more than rounding does: what can be compared is not measured. Keys are those of
the specification (ggml/docs/gguf.md); of the writer, only the table of pre-tokenizers' names is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from exporter.backends.gguf.vocabulary import pre_tokenizer
from exporter.families import Family
from exporter.model import MergedModel
from exporter.stopping import stop_tokens

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
_SHOWN = 60


def header_faults(metadata: Mapping[str, Any], model: MergedModel, family: Family) -> Iterator[str]:
    """What a header says otherwise than configuration and tokenizer, in words.

    Args:
        metadata: what the header says, by key.
        model: the merged model.
        family: its family.
    """
    stated = {"general.architecture": family.gguf_architecture}
    stated |= {f"{family.gguf_architecture}.{key}": value for key, value in _hyperparameters(model.config).items()}
    definition = model.tokenizer.definition()
    stated |= _tokenizer(model) | {"tokenizer.ggml.pre": pre_tokenizer(definition)}
    for key, wanted in stated.items():
        found = metadata.get(key)
        if not _same(found, wanted):
            yield f"{key} is {_shown(found)} and should be {_shown(wanted)}"
    # Beyond the tokens that have a text, the header may name them as it likes.
    texts = {index: text for text, index in definition["model"]["vocab"].items()}
    texts |= {int(entry["id"]): entry["content"] for entry in definition.get("added_tokens") or []}
    merges = dict(enumerate(map(_merge, definition["model"].get("merges") or [])))
    for key, pieces in (("tokens", texts), ("merges", merges)):
        yield from _list_faults(f"tokenizer.ggml.{key}", metadata.get(f"tokenizer.ggml.{key}") or [], pieces)
    count = len(metadata.get("tokenizer.ggml.merges") or [])
    if count > len(merges):
        yield f"tokenizer.ggml.merges has {count} and should have {len(merges)}"


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = config.get("num_attention_heads")
    return {key: config.get(source) for key, source in _SIZES.items()} | {
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        # What transformers takes where nothing is said.
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rope.scaling.type": None if kind == "default" else kind,
        "rope.scaling.factor": None if kind == "default" else rope.get("factor"),
    }


def _tokenizer(model: MergedModel) -> dict[str, Any]:
    eos = next(iter(stop_tokens(model).tokenizer), model.config.get("eos_token_id"))
    return {
        "tokenizer.ggml.eos_token_id": eos if isinstance(eos, int) else None,
        "tokenizer.chat_template": model.tokenizer.chat_template,
    }


def _list_faults(key: str, found: list[str], wanted: Mapping[int, str]) -> Iterator[str]:
    """The first that differs."""
    for index, text in wanted.items():
        if index >= len(found) or found[index] != text:
            there = found[index] if index < len(found) else None
            yield f"{key}[{index}] is {_shown(there)} and should be {_shown(text)}"
            return


def _merge(merge: str | list[str]) -> str:
    # As llama.cpp's converter joins a pair.
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "\u0120") for part in merge)


def _same(found: Any, wanted: Any) -> bool:
    """Whether a value is the one wanted; numbers as float32, which is what a header has."""
    if isinstance(wanted, float) and isinstance(found, int | float):
        return bool(np.float32(found) == np.float32(wanted))
    return bool(found == wanted)


def _shown(value: Any) -> str:
    text = "missing" if value is None else f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
