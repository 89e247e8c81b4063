"""The tokenizer as GGUF metadata: tokens, their types, merges, special ids, chat template.

Says what llama.cpp's converter says (conversion/base.py, `get_vocab_base` and gguf-py's `SpecialVocab`), but recognizes
the pre-tokenizer by its definition rather than by a hash of some tokens, so that a vocabulary of any size is recognized
and an unknown pattern is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exporter.backends.gguf.header import Value
from exporter.errors import TokenizerError
from exporter.inputs.tokenizer import SPECIAL_ROLES, TokenizerFiles, token_content
from exporter.merge.model import MergedModel
from exporter.tokens.end_tokens import stop_tokens

# gguf.TokenType
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Split patterns by the name under which llama.cpp implements them (src/llama-vocab.cpp).
PRE_TOKENIZERS: Mapping[str, str] = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
    "qwen2",
}  # fmt: skip


# Added tokens that llama.cpp's converter takes for control tokens in any case (does_token_look_special).
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|\[@BOS@\]", re.DOTALL)


def vocabulary_metadata(tokenizer: TokenizerFiles, config: Mapping[str, Any]) -> dict[str, Value]:
    """The `tokenizer.*` keys.

    Args:
        tokenizer: the tokenizer's files.
        config: the model's configuration; its `vocab_size` is kept, padding included.

    Raises:
        TokenizerError: the tokenizer has more tokens than the model, or a pre-tokenizer that llama.cpp does not know.
    """
    definition = tokenizer.definition()
    tokens, types = _tokens(definition, int(config["vocab_size"]))
    metadata = {
        "tokenizer.ggml.model": Value("string", "gpt2"),
        "tokenizer.ggml.pre": Value("string", pre_tokenizer(definition)),
        "tokenizer.ggml.tokens": Value("[string]", tokens),
        "tokenizer.ggml.token_type": Value("[int32]", types),
    }
    if merges := _merges(definition["model"].get("merges") or []):
        metadata["tokenizer.ggml.merges"] = Value("[string]", merges)
    for role, token in _special_ids(definition, tokenizer.config, config).items():
        metadata[f"tokenizer.ggml.{_ROLE_KEYS.get(role, role)}_token_id"] = Value("uint32", token)
    for role, added in _added_roles(definition, tokenizer.config).items():
        metadata[f"tokenizer.ggml.add_{role}_token"] = Value("bool", added)
    if (template := tokenizer.chat_template) is not None:
        metadata["tokenizer.chat_template"] = Value("string", template)
    return metadata


def end_of_turn_metadata(model: MergedModel) -> dict[str, Value]:
    """The token that ends a turn, where llama.cpp would not stop on it by itself.

    It stops on eos, and on `<|im_end|>` and `<|endoftext|>` by their texts (src/llama-vocab.cpp, special_eog_ids),
    which is why its converter writes no such key for a Qwen.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
    """
    stops = stop_tokens(model)
    tokens = {token: content for content, token in model.tokenizer.added_tokens.items()}
    ending = next(iter(stops.template), None)
    if ending is None or ending in stops.tokenizer or tokens.get(ending) in ("<|im_end|>", "<|endoftext|>"):
        return {}
    return {"tokenizer.ggml.eot_token_id": Value("uint32", ending)}


# Two roles have keys of another spelling (gguf.constants.Keys.Tokenizer).
_ROLE_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


def pre_tokenizer(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a `tokenizer.json`.

    Raises:
        TokenizerError: it is not one that llama.cpp implements.
    """
    outer = definition.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    pattern = next((str(step["pattern"].get("Regex")) for step in steps if step.get("type") == "Split"), "")
    if kinds == ["Split", "ByteLevel"] and pattern in PRE_TOKENIZERS:
        split, bytes_ = steps
        plain = not bytes_.get("add_prefix_space") and not bytes_.get("use_regex")
        if plain and split.get("behavior") == "Isolated" and not split.get("invert"):
            return PRE_TOKENIZERS[pattern]
    raise TokenizerError(
        "tokenizer.json: pre_tokenizer",
        found=f"{' + '.join(map(str, kinds))} with the pattern {pattern!r}",
        expected="Split + ByteLevel with the pattern of " + " or ".join(PRE_TOKENIZERS.values()),
        remedy="A fine-tune keeps the tokenizer of its base: give that one.",
    )


def _tokens(definition: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids without a token are named and marked unused."""
    vocabulary: Mapping[str, int] = definition["model"]["vocab"]
    added = {int(entry["id"]): entry for entry in definition.get("added_tokens") or []}
    largest = max(max(vocabulary.values(), default=-1), max(added, default=-1))
    if largest >= size:
        raise TokenizerError(
            "tokenizer.json",
            found=f"the token id {largest}",
            expected=f"ids below {size}, the rows of the embedding",
            remedy="Export with the resized embeddings merged, or give the tokenizer of the base.",
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for index, entry in added.items():
        content = entry["content"]
        control = entry.get("special") or LOOKS_SPECIAL.fullmatch(content)
        tokens[index], types[index] = content, CONTROL if control else USER_DEFINED
    return tokens, types


def _merges(merges: list[Any]) -> list[str]:
    """Merges as `left right`; tokenizers since 0.20 stores pairs, which may hold spaces."""
    if not merges or isinstance(merges[0], str):
        return merges
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]


def _special_ids(
    definition: Mapping[str, Any], tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """Ids of the special roles: by the tokenizer's own configuration, else by the model's."""
    added = {entry["content"]: int(entry["id"]) for entry in definition.get("added_tokens") or []}
    ids: dict[str, int] = {}
    for role in SPECIAL_ROLES:
        content = token_content(tokenizer_config.get(f"{role}_token"))
        token = added.get(content) if content is not None else None
        if token is not None:
            ids[role] = token
    for role in SPECIAL_ROLES:
        token = config.get(f"{role}_token_id")
        if role not in ids and type(token) is int and 0 <= token < int(config["vocab_size"]):
            ids[role] = token
    return ids


def _added_roles(definition: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> dict[str, bool]:
    """Whether BOS, EOS and so on are added to every text: by the post-processor, else by the configuration."""
    roles: dict[str, bool] = {}
    post = definition.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "ByteLevel":
            roles.setdefault("bos", False)
            roles.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing" and any(
            "SpecialToken" in part for part in step.get("single", [])
        ):
            raise TokenizerError(
                "tokenizer.json: post_processor",
                found="a template that adds special tokens to every text",
                expected="none, as in every Qwen",
                remedy="Give the tokenizer of the base.",
            )
    for role in SPECIAL_ROLES:
        if isinstance(added := tokenizer_config.get(f"add_{role}_token"), bool):
            roles.setdefault(role, added)
    return roles
