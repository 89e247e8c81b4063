"""Reads the text for token windows as one string: from a file, a dataset of the hub, or the embedded text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from exporter.errors import MissingFileError, RecipeError
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.recipe import Calibration
from exporter.tokens.embedded import BEGINNING_CHARACTERS, embedded_beginning, embedded_text

# Twice the length of a Qwen's token in English. A text with so many characters a token most likely has the tokens.
_CHARACTERS_A_TOKEN = 8


def read_beginnings(calibration: Calibration, tokenizer: TokenizerFiles, tokens: int) -> Iterator[str]:
    """Beginnings of the text that `calibration` names, each longer than the one before. The last is the whole text.

    The first one most likely has `tokens` tokens. A caller that counts fewer takes the next. A file is read whole.

    Args:
        calibration: names a text file, or one of JSON lines of `{"text": …}` or `{"messages": […]}`, the latter
            rendered by the chat template; or a dataset of the hub with such records; or the embedded text.
        tokenizer: gives the chat template.
        tokens: how many will be needed.

    Raises:
        MissingFileError, RecipeError: the file or dataset is missing or not as described.
    """
    characters = tokens * _CHARACTERS_A_TOKEN
    if calibration.dataset:
        yield from _read_dataset(calibration.dataset, tokenizer, characters)
    elif calibration.file:
        yield _read_file(calibration.file, tokenizer)
    else:
        if characters <= BEGINNING_CHARACTERS:
            yield embedded_beginning()
        yield embedded_text()


def _read_file(file: Path, tokenizer: TokenizerFiles) -> str:
    if not file.is_file():
        raise MissingFileError(
            str(file), found="no such file", expected="a .txt or .jsonl file", remedy="Check --calibration."
        )
    try:
        # Text mode would turn \r\n into \n, but every runtime and llama-perplexity gets the text as it is.
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(file), found=str(error), expected="UTF-8 text", remedy="Convert the file.") from None
    if file.suffix not in (".jsonl", ".json"):
        return text
    return _joined(_lines(file, text, tokenizer))


# A record's text, and whether it is a conversation.
_Record = tuple[str, bool]


def _joined(records: Iterable[_Record]) -> str:
    """Join records to one text. A line end follows all but the last, and conversations, which their template ends."""
    texts: list[str] = []
    for text, is_conversation in records:
        texts += [text, "" if is_conversation else "\n"]
    return "".join(texts[:-1])


def _lines(file: Path, text: str, tokenizer: TokenizerFiles) -> Iterator[_Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                where, found=str(error), expected="one JSON object a line", remedy="Correct it."
            ) from None
        yield _record_text(record, tokenizer, where)


def _read_dataset(dataset: str, tokenizer: TokenizerFiles, characters: int) -> Iterator[str]:
    """The first records that have so many characters together, then twice as many, and so on until all."""
    records: list[_Record] = []
    length = 0
    column = dataset.partition("#")[2] or None
    for number, record in enumerate(_dataset_records(dataset), 1):
        records.append(_record_text(record, tokenizer, f"{dataset}, record {number}", column))
        length += len(records[-1][0])
        if length >= characters:
            yield _joined(records)
            characters = 2 * length
    yield _joined(records)


def _dataset_records(dataset: str) -> Iterator[Any]:
    """The records of `OWNER/NAME[@REVISION][:[CONFIGURATION/]SPLIT][#COLUMN]`, fetched as they are needed.

    The default is split `train`, and the dataset's own default configuration, if it has one.

    Raises:
        RecipeError: `datasets` is not installed, or it cannot load the dataset.
    """
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise RecipeError(
            f"dataset {dataset}",
            found="the package datasets is not installed",
            expected="the package, which reads datasets of the hub",
            remedy="pip install 'exporter[datasets]', or give a .txt or .jsonl file with --calibration.",
        ) from None
    name, _, split = dataset.partition("#")[0].partition(":")
    name, _, revision = name.partition("@")
    # The configuration is `name` there; without one, the dataset's default.
    *configuration, split = (split or "train").split("/")
    try:
        yield from datasets.load_dataset(name, *configuration, revision=revision or None, split=split, streaming=True)
    except Exception as error:  # of many classes, from the network to the dataset's own files
        raise RecipeError(
            f"dataset {dataset}",
            found=_printable(f"{type(error).__name__}: {error}")[:200],
            expected="a dataset of the hub that can be read",
            remedy="Check the id, the configuration, the split and the network, or give a file with --calibration.",
        ) from None


def _record_text(record: Any, tokenizer: TokenizerFiles, where: str, column: str | None = None) -> _Record:
    """A record's text, or its conversation as the chat template renders it."""
    text: Any = None
    is_conversation = False
    if isinstance(record, Mapping):
        text = record.get(column or "text")
        if not isinstance(text, str) and isinstance(messages := record.get(column or "messages"), list):
            text, is_conversation = _render(messages, record.get("tools"), tokenizer, where), True
    if not isinstance(text, str):
        raise RecipeError(
            where,
            found=_printable(json.dumps(record, ensure_ascii=False, default=str))[:80],
            expected=f"text or messages in {column}" if column else '{"text": "…"} or {"messages": […]}',
            remedy="Correct it; of a dataset, another column can be named as OWNER/NAME#COLUMN.",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(
            where, found=f"half a surrogate pair, {_printable(text[error.start])}, as character {error.start + 1}",
            expected="text that UTF-8 can hold", remedy="Correct it: whatever wrote it cut a character in two.",
        ) from None  # fmt: skip
    return text, is_conversation


def _printable(text: str) -> str:
    """A value for a message. JSON can hold characters that cannot be sent to a terminal."""
    return text.encode("utf-8", "backslashreplace").decode()


def _render(messages: list[Any], tools: Any, tokenizer: TokenizerFiles, where: str) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.chat_template
    if template is None:
        raise RecipeError(
            where, found="a conversation", expected="a model with a chat template", remedy="Give plain text."
        )
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template, **tokenizer.special_tokens
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RecipeError(
            where,
            found=_printable(f"a conversation that the template refuses ({error})"),
            expected="messages that the chat template renders",
            remedy="Correct the messages.",
        ) from None
    return str(rendered[0])
