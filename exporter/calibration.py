"""Evaluation text → token windows. The same ids go to every runtime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import MissingFileError, RecipeError, TokenizerError
from exporter.recipe import Evaluation
from exporter.tokenizer import TokenizerFiles

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Windows:
    """Token windows to score, by llama-perplexity's protocol.

    The text is tokenized once and cut into windows that do not overlap; the remainder is dropped and nothing is carried
    from one window to the next. In each window the predictions of positions n_ctx/2 + 1 … n_ctx - 1 are scored
    (tools/perplexity/perplexity.cpp in llama.cpp).

    Attributes:
        ids: the windows, each a tuple of n_ctx token ids.
        n_ctx: tokens in a window.
        source: file name of the text, or `embedded`.
        sha256: hash of the ids as little-endian 32-bit integers.
    """

    ids: tuple[tuple[int, ...], ...]
    n_ctx: int
    source: str
    sha256: str

    @property
    def first_scored(self) -> int:
        """Index of the first position whose prediction is scored: the token at this index + 1 is the target."""
        return self.n_ctx // 2

    @property
    def scored(self) -> int:
        """Scored predictions in a window."""
        return self.n_ctx - 1 - self.first_scored

    @property
    def tokens_scored(self) -> int:
        """Scored predictions in all."""
        return len(self.ids) * self.scored


def make_windows(evaluation: Evaluation, tokenizer: TokenizerFiles) -> Windows:
    """Read, tokenize and cut the evaluation text.

    Raises:
        MissingFileError, RecipeError: the text cannot be read, or is shorter than one window.
        TokenizerError: the tokenizer cannot be loaded.
    """
    text = read_text(evaluation.calibration, tokenizer)
    ids = tokenize(text, tokenizer)
    wanted = max(1, evaluation.tokens // evaluation.n_ctx)
    count = min(wanted, len(ids) // evaluation.n_ctx)
    source = evaluation.calibration.name if evaluation.calibration else EMBEDDED
    if count == 0:
        raise RecipeError(
            f"evaluation text {source}",
            found=f"{len(ids)} tokens",
            expected=f"at least {evaluation.n_ctx}, one window",
            remedy="Give a longer text with --calibration.",
        )
    windows = tuple(
        tuple(ids[start : start + evaluation.n_ctx]) for start in range(0, count * evaluation.n_ctx, evaluation.n_ctx)
    )
    packed = b"".join(token.to_bytes(4, "little") for window in windows for token in window)
    return Windows(windows, evaluation.n_ctx, source, hashlib.sha256(packed).hexdigest())


def read_text(file: Path | None, tokenizer: TokenizerFiles) -> str:
    """The whole evaluation text.

    Args:
        file: a text file; or JSON lines of `{"text": …}` or `{"messages": […]}`, the latter rendered by the chat
            template; None for the embedded text.
        tokenizer: gives the chat template.

    Raises:
        MissingFileError, RecipeError: the file is missing or not as described.
    """
    if file is None:
        return embedded_text()
    if not file.is_file():
        raise MissingFileError(
            str(file), found="no such file", expected="a .txt or .jsonl file", remedy="Check --calibration."
        )
    try:
        # Not in text mode, which would turn \r\n into \n: every runtime and llama-perplexity gets the text as it is.
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(file), found=str(error), expected="UTF-8 text", remedy="Convert the file.") from None
    if file.suffix not in (".jsonl", ".json"):
        return text
    return "\n".join(_records(file, text, tokenizer))


def embedded_text() -> str:
    """The text that every Python installation carries: the topics of its built-in help, in a fixed mixed order."""
    from pydoc_data.topics import topics

    # By hash of the name rather than alphabetically, so that a few windows already cover unlike topics.
    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    # Topics repeat each other's paragraphs; a paragraph that was seen before is too easily predicted.
    paragraphs = dict.fromkeys(part for name in order for part in topics[name].strip().split("\n\n"))
    return "\n\n".join(paragraphs)


def _records(file: Path, text: str, tokenizer: TokenizerFiles) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RecipeError(
                where, found=str(error), expected="one JSON object a line", remedy="Correct it."
            ) from None
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"]
        elif isinstance(record, dict) and isinstance(record.get("messages"), list):
            yield _render(record, tokenizer, where)
        else:
            raise RecipeError(
                where, found=line[:80], expected='{"text": "…"} or {"messages": […]}', remedy="Correct the line."
            )


def _render(record: Mapping[str, Any], tokenizer: TokenizerFiles, where: str) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.chat_template
    if template is None:
        raise RecipeError(
            where, found="a conversation", expected="a model with a chat template", remedy="Give plain text."
        )
    try:
        rendered, _ = render_jinja_template(
            conversations=[record["messages"]],
            tools=record.get("tools"),
            chat_template=template,
            **tokenizer.special_tokens,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RecipeError(
            where, found=f"a conversation that the template refuses ({error})", expected="one that it renders",
            remedy="Correct the line.",
        ) from None  # fmt: skip
    return str(rendered[0])


def tokenize(text: str, tokenizer: TokenizerFiles) -> list[int]:
    """Token ids of a text; special tokens in it are parsed as such, and none are added.

    Raises:
        TokenizerError: `tokenizer.json` is missing or cannot be loaded.
    """
    from tokenizers import Tokenizer

    if "tokenizer.json" not in tokenizer.files:
        raise TokenizerError(
            "tokenizer.json",
            found="no such file",
            expected="a fast tokenizer",
            remedy="Export with --no-verify, or add it.",
        )
    try:
        loaded = Tokenizer.from_file(str(tokenizer.files["tokenizer.json"]))
    except Exception as error:  # the Rust library raises bare Exception
        raise TokenizerError(
            "tokenizer.json", found=str(error)[:200], expected="a tokenizer that loads", remedy="Fetch it again."
        ) from None
    ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
    return ids
