"""Texts: files, JSON lines, conversations by the chat template, datasets of the hub; and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.errors import MissingFileError, RecipeError
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.recipe import Calibration, Evaluation
from exporter.tokens.embedded import embedded_beginning, embedded_text
from exporter.tokens.texts import read_beginnings
from exporter.tokens.windows import make_windows, tokenize
from tests.folders import copy, edit_json

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What's a class?"},
    {"role": "assistant", "content": "A thing that makes things.\nLike this."},
]


@pytest.fixture
def folder(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    return copy(make_base("qwen2"), tmp_path / "base")


@pytest.fixture
def files(folder: Path) -> TokenizerFiles:
    return TokenizerFiles.choose(folder, ())


def read(text: Path | str | None, files: TokenizerFiles, tokens: int = 1000) -> str:
    """What most likely has so many tokens."""
    return next(read_beginnings(Calibration(text=text), files, tokens))


def write_lines(file: Path, *records: Any) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8000, 8001, 10_000_000])
def test_the_default_is_the_embedded_text(files: TokenizerFiles, tokens: int) -> None:
    """Whole, or as much of it as is needed."""
    assert read(None, files, tokens) == (embedded_text() if tokens > 8000 else embedded_beginning())


def test_a_text_is_taken_to_the_byte(files: TokenizerFiles, tmp_path: Path) -> None:
    """As llama-perplexity takes it: a carriage return is a token of its own."""
    raw = "one\r\ntwo\rthree\n\ttab é\n".encode()
    (tmp_path / "text.txt").write_bytes(raw)
    assert read(tmp_path / "text.txt", files).encode() == raw


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_lines_of_text(files: TokenizerFiles, tmp_path: Path, name: str) -> None:
    file = write_lines(tmp_path / name, {"text": "one\ntwo"}, {"text": "é", "label": 3})
    file.write_text("\n" + file.read_text(encoding="utf-8") + "\n  \n", encoding="utf-8")
    assert read(file, files) == "one\ntwo\né"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_newline_and_nowhere_else(files: TokenizerFiles, tmp_path: Path, character: str) -> None:
    """JSON allows these within a string as they are, and Python's splitlines takes them for line ends."""
    file = write_lines(tmp_path / "data.jsonl", {"text": f"one{character}two"}, {"text": "three"})
    assert read(file, files) == f"one{character}two\nthree"


def test_messages_are_rendered_by_the_template(folder: Path, files: TokenizerFiles, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT}, {"text": "plain"}, {"messages": CHAT[:1]})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:1]))
    assert first.endswith("<|im_end|>\n")
    # A second line end after a turn would be another token, which no model saw there in training.
    assert read(file, files) == f"{first}plain\n{second}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}",
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}",
        "{{ bos_token if bos_token else '' }}{% for m in messages %}\n    {{ m['content'] }}\n{% endfor %}",
    ],
    ids=["eos-token", "generation", "tools", "bos-token"],
)
def test_a_template_sees_what_transformers_shows_it(folder: Path, tmp_path: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT, "tools": tools})
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert read(file, TokenizerFiles.choose(folder, ())) == expected


def test_the_adapter_s_template_goes_before_the_base_s(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    assert read(file, TokenizerFiles.choose(folder, (adapter,))) == "What's a class?!"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["not json", "[1, 2]", '"text"', "{}", '{"text": 3}', '{"messages": "hi"}', '{"prompt": "x"}', '{"text": "x"'],
)
def test_a_line_that_is_none_is_refused_by_its_number(files: TokenizerFiles, tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read(tmp_path / "data.jsonl", files)
    assert caught.value.thing == "data.jsonl:3"


@pytest.mark.parametrize(
    "messages", [[], ["hi"], [{"role": "user"}], [{"content": "no role"}], [None], [{"role": "x", "content": None}]]
)
def test_messages_that_the_template_refuses_are_refused_by_their_line(
    folder: Path, tmp_path: Path, messages: list[Any]
) -> None:
    template = (
        "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('role') }}{% endif %}"
        "{{ m['role'] + m['content'] }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = write_lines(tmp_path / "chats.jsonl", {"text": "fine"}, {"messages": messages})
    with pytest.raises(RecipeError) as caught:
        read(file, TokenizerFiles.choose(folder, ()))
    assert caught.value.thing == "chats.jsonl:2"


def test_messages_without_a_template_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(RecipeError, match="chat template"):
        read(file, TokenizerFiles.choose(folder, ()))


def test_a_template_that_is_not_one_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(RecipeError, match=r"chats\.jsonl:1"):
        read(file, TokenizerFiles.choose(folder, ()))


def test_no_file_is_refused(files: TokenizerFiles, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="--calibration"):
        read(tmp_path / "none.txt", files)


def test_text_that_is_not_utf8_is_refused(files: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(RecipeError, match="UTF-8"):
        read(tmp_path / "latin.txt", files)


@pytest.mark.parametrize(
    "line",
    [r'{"text": "one \ud800"}', r'{"messages": [{"role": "user", "content": "\udfff"}]}', r'{"prompt": "\ud800"}'],
)
def test_half_a_surrogate_pair_is_refused_by_its_line(files: TokenizerFiles, tmp_path: Path, line: str) -> None:
    """JSON may have it, and no tokenizer takes it."""
    (tmp_path / "data.jsonl").write_text(r'{"text": "\ud83d\ude00"}' + f"\n{line}\n")
    with pytest.raises(RecipeError, match=r"surrogate|messages") as caught:
        read(tmp_path / "data.jsonl", files)
    assert caught.value.thing == "data.jsonl:2"
    assert str(caught.value).encode()


def test_what_is_nested_too_deeply_is_refused(files: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("[" * 100_000)
    with pytest.raises(RecipeError) as caught:
        read(tmp_path / "data.jsonl", files)
    assert caught.value.thing == "data.jsonl:1"


# --- datasets ------------------------------------------------------------------------------------------------------


class Hub(ModuleType):
    """A stand-in for `datasets`: counts the records that are asked for, and notes the arguments."""

    def __init__(self, *records: Any) -> None:
        super().__init__("datasets")
        self.records = records
        self.arguments: list[Any] = []
        self.served = 0

    def load_dataset(self, *names: str, **options: Any) -> Iterator[Any]:
        self.arguments = [*names, options]
        return self._serve()

    def _serve(self) -> Iterator[Any]:
        for record in self.records:
            self.served += 1
            if isinstance(record, Exception):
                raise record
            yield record


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def serve(*records: Any) -> Hub:
        made = Hub(*records)
        monkeypatch.setitem(sys.modules, "datasets", made)
        return made

    return serve


@pytest.mark.parametrize(
    ("dataset", "arguments"),
    [
        ("org/name", ["org/name", {"revision": None, "split": "train", "streaming": True}]),
        ("o/n-a.m_e@refs/pr/1", ["o/n-a.m_e", {"revision": "refs/pr/1", "split": "train", "streaming": True}]),
        ("org/name:test", ["org/name", {"revision": None, "split": "test", "streaming": True}]),
        (
            "org/name:wiki-2.v1/test",
            ["org/name", "wiki-2.v1", {"revision": None, "split": "test", "streaming": True}],
        ),
        ("org/name@v1:en/test#text", ["org/name", "en", {"revision": "v1", "split": "test", "streaming": True}]),
        ("org/name@v1:test#text", ["org/name", {"revision": "v1", "split": "test", "streaming": True}]),
    ],
)
def test_the_id_says_revision_configuration_and_split(
    hub: Callable[..., Hub], files: TokenizerFiles, dataset: str, arguments: list[Any]
) -> None:
    made = hub({"text": "one"}, {"text": "two"})
    assert read(dataset, files) == "one\ntwo"
    assert made.arguments == arguments


def test_no_more_records_are_read_than_are_needed(hub: Callable[..., Hub], files: TokenizerFiles) -> None:
    made = hub(*[{"text": "x" * 100}] * 50)
    assert len(read("org/name", files, tokens=100)) == 8 * 100 + 7
    assert made.served == 8


def test_more_records_are_read_where_those_are_not_enough(hub: Callable[..., Hub], files: TokenizerFiles) -> None:
    """A special token is one for its 13 characters."""
    record = {"text": "<|endoftext|>" * 76 + " " * 12}
    made = hub(*[record] * 50)
    beginnings = read_beginnings(Calibration(text="org/name"), files, 1000)
    lengths = [(len(next(beginnings)), made.served) for _ in range(3)]
    assert lengths == [(8007, 8), (16015, 16), (32031, 32)]
    evaluation = Evaluation(tokens=256, n_ctx=64)
    assert len(tokenize(read("org/name", files, tokens=256), files)) < 256
    assert make_windows(Calibration(text="org/name"), evaluation, files).tokens == 256
    hub({"text": "short"})
    with pytest.raises(RecipeError, match="at least 64"):
        make_windows(Calibration(text="org/name"), evaluation, files)


@pytest.mark.parametrize("column", [None, "messages", "conversation"])
def test_conversations_of_a_dataset(
    hub: Callable[..., Hub], folder: Path, files: TokenizerFiles, column: str | None
) -> None:
    hub({column or "messages": CHAT, "id": 3})
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
    assert read("org/name" + (f"#{column}" if column else ""), files) == expected


def test_a_column_goes_before_text(hub: Callable[..., Hub], files: TokenizerFiles) -> None:
    hub({"text": "one", "body": "two"})
    assert read("org/name#body", files) == "two"


@pytest.mark.parametrize(("column", "record"), [("", {"body": "x"}), ("#body", {"text": "x"}), ("", {"text": None})])
def test_a_record_without_text_is_refused_by_its_number(
    hub: Callable[..., Hub], files: TokenizerFiles, column: str, record: Any
) -> None:
    hub({"text": "fine", "body": "fine"}, record)
    with pytest.raises(RecipeError, match="#COLUMN") as caught:
        read(f"org/name{column}", files)
    assert caught.value.thing == f"org/name{column}, record 2"


@pytest.mark.parametrize("error", [ValueError("no such split"), ConnectionError("offline"), KeyError("x")])
def test_a_dataset_that_cannot_be_read_is_refused(
    hub: Callable[..., Hub], files: TokenizerFiles, error: Exception
) -> None:
    hub({"text": "fine"}, error)
    with pytest.raises(RecipeError) as caught:
        read("org/name", files)
    assert caught.value.thing == "dataset org/name"
    assert type(error).__name__ in caught.value.found


def test_without_datasets_it_says_what_to_install(files: TokenizerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError) as caught:
        read("org/name", files)
    assert "pip install 'exporter[datasets]'" in caught.value.remedy
