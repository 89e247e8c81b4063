"""Tokenizer files: which ones the merged model carries, and what a GGUF header needs to know of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import TokenizerError

# Everything that transformers writes or reads beside a fast tokenizer.
TOKENIZER_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json")
SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of the merged model.

    Attributes:
        files: file name to path, of the files that exist.
        origin: `base` or `adapter`: where tokenizer.json comes from.
    """

    files: Mapping[str, Path]
    origin: str

    @classmethod
    def choose(cls, base: Path, adapters: tuple[Path, ...]) -> TokenizerFiles:
        """The last adapter's files where it carries a tokenizer of its own, else the base's; templates likewise."""
        files, origin = _present(base), "base"
        for adapter in adapters:
            own = _present(adapter)
            if "tokenizer.json" in own:
                kept = {} if _has_template(own) else {name: files[name] for name in TEMPLATE_NAMES if name in files}
                files, origin = own | kept, "adapter"
            elif _has_template(own) and "tokenizer_config.json" in own:
                files = {name: path for name, path in files.items() if name not in TEMPLATE_NAMES}
                files |= {name: own[name] for name in ("tokenizer_config.json", *TEMPLATE_NAMES) if name in own}
            elif templates := {name: own[name] for name in TEMPLATE_NAMES if name in own}:
                files = {name: path for name, path in files.items() if name not in TEMPLATE_NAMES} | templates
        return cls(dict(sorted(files.items())), origin)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`, or an empty mapping."""
        return self._json("tokenizer_config.json") if "tokenizer_config.json" in self.files else {}

    @cached_property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens beside the vocabulary proper, the special ones among them, by content."""
        if "tokenizer.json" not in self.files:
            return {}
        return {entry["content"]: int(entry["id"]) for entry in self._json("tokenizer.json").get("added_tokens") or []}

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by role, as `eos_token`: what transformers shows to a chat template."""
        found = {f"{role}_token": token_content(self.config.get(f"{role}_token")) for role in SPECIAL_ROLES}
        return {role: content for role, content in found.items() if content is not None}

    @property
    def chat_template(self) -> str | None:
        """The chat template's source: its own file goes before the one in `tokenizer_config.json`.

        A list of named templates gives the one named `default`.
        """
        template: Any = self.config.get("chat_template")
        if "chat_template.jinja" in self.files:
            template = self.files["chat_template.jinja"].read_text(encoding="utf-8")
        elif "chat_template.json" in self.files:
            template = self._json("chat_template.json").get("chat_template", template)
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template if isinstance(template, str) else None

    def definition(self) -> dict[str, Any]:
        """`tokenizer.json` as read. Not cached: the vocabulary of a Qwen takes 100 MB as objects.

        Raises:
            TokenizerError: there is no tokenizer.json, or it is not a byte-level BPE tokenizer.
        """
        if "tokenizer.json" not in self.files:
            raise TokenizerError(
                "tokenizer.json",
                found="no such file in the base or the adapter",
                expected="the fast tokenizer of the base",
                remedy="Save it with AutoTokenizer.from_pretrained(…).save_pretrained(…).",
            )
        definition = self._json("tokenizer.json")
        kind = (definition.get("model") or {}).get("type")
        if kind != "BPE":
            raise TokenizerError(
                "tokenizer.json: model.type", found=repr(kind), expected="'BPE'", remedy="Give the Qwen tokenizer."
            )
        return definition

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.files[name].read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(
                name, found=f"text that is not JSON ({error})", expected="JSON", remedy="Fetch the file again."
            ) from None
        if not isinstance(value, dict):
            raise TokenizerError(name, found=type(value).__name__, expected="a JSON object", remedy="Fetch it again.")
        return value


def _has_template(files: Mapping[str, Path]) -> bool:
    return TokenizerFiles(files, "").chat_template is not None


def _present(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()}


def load_encoder(file: Path) -> Any:
    """A `tokenizers.Tokenizer` that gives every token of a text.

    What a trainer set and saved with it is undone: `truncation` cuts a text, and `padding` adds tokens.

    Args:
        file: `tokenizer.json`.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise TokenizerError(
            "tokenizer.json", found=str(error)[:200], expected="a tokenizer that loads", remedy="Fetch it again."
        ) from None
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def token_content(entry: Any) -> str | None:
    """A special token's text: given as a string or as an AddedToken object."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None
