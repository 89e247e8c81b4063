"""Holds what a GGUF header says of the tokenizer against the tokenizer's files.

A token that llama.cpp adds to every prompt, or takes for text where it is none, changes no weight and few scores. Of
the writer, only the tables of pre-tokenizers and of texts that look like control tokens are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.backends.gguf.metadata.tokenizer_keys import LOOKS_SPECIAL, pre_tokenizer
from exporter.inputs.tokenizer import token_content
from exporter.merge.model import MergedModel
from exporter.tokens.end_tokens import stop_tokens

PREFIX = "tokenizer.ggml."
# Roles of the special tokens with what llama.cpp calls them (gguf-py, Keys.Tokenizer), spelling and all.
_ROLES = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask",
}  # fmt: skip
# llama.cpp's token types (llama_token_type in include/llama.h).
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# On these llama.cpp stops by their texts.
_KNOWN_ENDS = ("<|im_end|>", "<|endoftext|>")


def tokenizer_values(model: MergedModel, definition: Mapping[str, Any]) -> dict[str, Any]:
    """What the header should say, by key, but for the lists; None where it should say nothing.

    Args:
        model: the merged model.
        definition: `tokenizer.json`.
    """
    values = {f"{PREFIX}{name}_token_id": _special_id(model, role) for role, name in _ROLES.items()}
    values |= {f"{PREFIX}add_{role}_token": added for role, added in _added(model, definition).items()}
    return values | {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": pre_tokenizer(definition),
        f"{PREFIX}eot_token_id": _end_of_turn(model),
        "tokenizer.chat_template": model.tokenizer.chat_template,
    }


def piece_faults(metadata: Mapping[str, Any], model: MergedModel, definition: Mapping[str, Any]) -> Iterator[str]:
    """What the header's lists of tokens, their types and merges say otherwise, in words."""
    added = {int(entry["id"]): entry for entry in definition.get("added_tokens") or []}
    texts = {index: text for text, index in definition["model"]["vocab"].items()}
    types = dict.fromkeys(texts, _NORMAL) | {index: _added_type(entry) for index, entry in added.items()}
    texts |= {index: entry["content"] for index, entry in added.items()}
    size = int(model.config["vocab_size"])
    merges = dict(enumerate(map(_merge, definition["model"].get("merges") or [])))
    # Beyond the tokens that have a text, the header may name them as it likes.
    for key, pieces, count in (
        ("tokens", texts, size),
        ("token_type", dict.fromkeys(range(size), _UNUSED) | types, size),
        ("merges", merges, len(merges)),
    ):
        yield from _list_faults(f"{PREFIX}{key}", metadata.get(f"{PREFIX}{key}") or [], pieces, count)


def _special_id(model: MergedModel, role: str) -> int | None:
    """By the tokenizer's own configuration, else by the model's."""
    content = token_content(model.tokenizer.config.get(f"{role}_token"))
    token = model.tokenizer.added_tokens.get(content) if content is not None else None
    if token is None:
        token = model.config.get(f"{role}_token_id")
    return token if type(token) is int and 0 <= token < int(model.config["vocab_size"]) else None


def _added(model: MergedModel, definition: Mapping[str, Any]) -> dict[str, bool | None]:
    """Whether a special token is added to every text; a byte-level post-processor adds none."""
    post = definition.get("post_processor") or {}
    byte_level = any(step.get("type") == "ByteLevel" for step in post.get("processors", [post]))
    found: dict[str, bool | None] = {}
    for role in _ROLES:
        said = model.tokenizer.config.get(f"add_{role}_token")
        found[role] = said if isinstance(said, bool) else None
    return found | {"bos": False, "eos": False} if byte_level else found


def _end_of_turn(model: MergedModel) -> int | None:
    """What the chat template puts after an answer, if llama.cpp would not stop on it otherwise."""
    stops = stop_tokens(model)
    known = {model.tokenizer.added_tokens.get(text) for text in _KNOWN_ENDS}
    ending = next(iter(stops.template), None)
    return None if ending in stops.tokenizer or ending in known else ending


def _added_type(entry: Mapping[str, Any]) -> int:
    return _CONTROL if entry.get("special") or LOOKS_SPECIAL.fullmatch(entry["content"]) else _USER_DEFINED


def _list_faults(key: str, found: Sequence[Any], wanted: Mapping[int, Any], count: int) -> Iterator[str]:
    """The first that differs, and another number of them."""
    if not isinstance(found, list):
        yield f"{key} is {shown(found)} and should be a list"
        return
    for index, piece in wanted.items():
        if index >= len(found) or found[index] != piece:
            there = found[index] if index < len(found) else None
            yield f"{key}[{index}] is {shown(there)} and should be {shown(piece)}"
            return
    if len(found) != count:
        yield f"{key} has {len(found)} and should have {count}"


def _merge(merge: str | list[str]) -> str:
    # As llama.cpp's converter joins a pair.
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "\u0120") for part in merge)


def shown(value: Any, longest: int = 60) -> str:
    """A value in words, of no more than so many characters."""
    text = "missing" if value is None else f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"
