"""Evaluation text → windows: against transformers' tokenizer and template, by llama-perplexity's protocol."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.calibration import Windows, embedded_text, make_windows, read_text, tokenize
from exporter.errors import MissingFileError, RecipeError, TokenizerError
from exporter.recipe import Evaluation
from exporter.tokenizer import TokenizerFiles
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


def windows(files: TokenizerFiles, file: Path | None, tokens: int = 10_000, n_ctx: int = 64) -> Windows:
    return make_windows(Evaluation(calibration=file, tokens=tokens, n_ctx=n_ctx), files)


def ids_of(folder: Path, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    return found


# --- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [64, 65, 512])
def test_windows_follow_each_other_and_the_remainder_is_dropped(
    folder: Path, files: TokenizerFiles, tmp_path: Path, n_ctx: int
) -> None:
    text = embedded_text()[:6000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = ids_of(folder, text)
    found = windows(files, tmp_path / "text.txt", n_ctx=n_ctx)
    assert len(found.ids) == len(ids) // n_ctx > 1
    assert len(ids) % n_ctx > 0
    assert [token for window in found.ids for token in window] == ids[: len(found.ids) * n_ctx]
    assert {len(window) for window in found.ids} == {n_ctx}
    assert found.source == "text.txt"
    assert found.n_ctx == n_ctx
    # tools/perplexity/perplexity.cpp: first = n_ctx/2, and n_ctx - first - 1 predictions a window.
    assert found.tokens_scored == len(found.ids) * (n_ctx - n_ctx // 2 - 1)


@pytest.mark.parametrize(("tokens", "count"), [(64, 1), (100, 1), (128, 2), (191, 2), (767, 11), (100_000, 12)])
def test_whole_windows_of_as_many_tokens_as_wanted(
    files: TokenizerFiles, tmp_path: Path, tokens: int, count: int
) -> None:
    (tmp_path / "text.txt").write_text("<|im_end|>" * 800, encoding="utf-8")
    assert len(windows(files, tmp_path / "text.txt", tokens).ids) == count


def test_at_least_one_window_is_scored(files: TokenizerFiles) -> None:
    assert len(windows(files, None, tokens=64, n_ctx=512).ids) == 1


def test_hash_is_of_the_scored_ids(files: TokenizerFiles) -> None:
    found = windows(files, None, tokens=256)
    flat = [token for window in found.ids for token in window]
    assert found.sha256 == hashlib.sha256(struct.pack(f"<{len(flat)}i", *flat)).hexdigest()
    assert found.sha256 == windows(files, None, tokens=256).sha256
    assert found.sha256 != windows(files, None, tokens=192).sha256


def test_too_little_text_is_refused_with_the_number_needed(files: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only this", encoding="utf-8")
    count = len(tokenize("only this", files))
    with pytest.raises(RecipeError) as caught:
        windows(files, tmp_path / "short.txt", n_ctx=512)
    assert "short.txt" in caught.value.thing
    assert caught.value.found == f"{count} tokens"
    assert "512" in caught.value.expected


def test_as_many_tokens_as_one_window_are_enough(files: TokenizerFiles, tmp_path: Path) -> None:
    text = "<|im_end|>" * 64
    (tmp_path / "exact.txt").write_text(text, encoding="utf-8")
    assert len(windows(files, tmp_path / "exact.txt").ids) == 1
    (tmp_path / "short.txt").write_text("<|im_end|>" * 63, encoding="utf-8")
    with pytest.raises(RecipeError, match="63 tokens"):
        windows(files, tmp_path / "short.txt")


# --- tokens --------------------------------------------------------------------------------------------------------


def test_special_tokens_are_parsed_and_none_are_added(folder: Path, files: TokenizerFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenize("<|im_start|>user\nhi<|im_end|>", files)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (found[0], found[-1]) == (start, end)
    assert found.count(start) == found.count(end) == 1
    assert found == ids_of(folder, "<|im_start|>user\nhi<|im_end|>")


@pytest.mark.parametrize(
    "text", ["", "plain", "Ünïcödé 你好 🦙", "tab\there\r\nand 1234\n\n\n", embedded_text()[:3000]]
)
def test_tokens_are_transformers(folder: Path, files: TokenizerFiles, text: str) -> None:
    assert tokenize(text, files) == ids_of(folder, text)


@pytest.mark.parametrize(
    "damage",
    [lambda file: file.unlink(), lambda file: file.write_text("{"), lambda file: file.write_text('{"model": {}}')],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        tokenize("text", TokenizerFiles.choose(folder, ()))


# --- texts ---------------------------------------------------------------------------------------------------------


def test_the_embedded_text_is_fixed_long_and_without_repetition() -> None:
    from pydoc_data.topics import topics

    text = embedded_text()
    assert text == embedded_text()
    assert len(text) > 200_000
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert set(paragraphs) == {part for topic in topics.values() for part in topic.strip().split("\n\n")}


def test_the_default_is_the_embedded_text(files: TokenizerFiles) -> None:
    assert windows(files, None).source == "embedded"
    assert read_text(None, files) == embedded_text()


def test_a_text_is_taken_to_the_byte(files: TokenizerFiles, tmp_path: Path) -> None:
    """As llama-perplexity takes it: a carriage return is a token of its own."""
    raw = "one\r\ntwo\rthree\n\ttab é\n".encode()
    (tmp_path / "text.txt").write_bytes(raw)
    assert read_text(tmp_path / "text.txt", files).encode() == raw


def write_lines(file: Path, *records: Any) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_lines_of_text(files: TokenizerFiles, tmp_path: Path, name: str) -> None:
    file = write_lines(tmp_path / name, {"text": "one\ntwo"}, {"text": "é", "label": 3})
    file.write_text("\n" + file.read_text(encoding="utf-8") + "\n  \n", encoding="utf-8")
    assert read_text(file, files) == "one\ntwo\né"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_newline_and_nowhere_else(files: TokenizerFiles, tmp_path: Path, character: str) -> None:
    """JSON allows these within a string as they are, and Python's splitlines takes them for line ends."""
    file = write_lines(tmp_path / "data.jsonl", {"text": f"one{character}two"}, {"text": "three"})
    assert read_text(file, files) == f"one{character}two\nthree"


def test_messages_are_rendered_by_the_template(folder: Path, files: TokenizerFiles, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT}, {"text": "plain"}, {"messages": CHAT[:1]})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:1])]
    assert read_text(file, files) == "\n".join([expected[0], "plain", expected[1]])
    found = windows(files, write_lines(tmp_path / "many.jsonl", *[{"messages": CHAT}] * 20))
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in found.ids[0]


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
    assert read_text(file, TokenizerFiles.choose(folder, ())) == expected


def test_the_adapter_s_template_goes_before_the_base_s(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    assert read_text(file, TokenizerFiles.choose(folder, (adapter,))) == "What's a class?!"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["not json", "[1, 2]", '"text"', "{}", '{"text": 3}', '{"messages": "hi"}', '{"prompt": "x"}', '{"text": "x"'],
)
def test_a_line_that_is_none_is_refused_by_its_number(files: TokenizerFiles, tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_text(tmp_path / "data.jsonl", files)
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
        read_text(file, TokenizerFiles.choose(folder, ()))
    assert caught.value.thing == "chats.jsonl:2"


def test_messages_without_a_template_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(RecipeError, match="chat template"):
        read_text(file, TokenizerFiles.choose(folder, ()))


def test_a_template_that_is_not_one_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    file = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(RecipeError, match=r"chats\.jsonl:1"):
        read_text(file, TokenizerFiles.choose(folder, ()))


def test_no_file_is_refused(files: TokenizerFiles, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="--calibration"):
        read_text(tmp_path / "none.txt", files)


def test_text_that_is_not_utf8_is_refused(files: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(RecipeError, match="UTF-8"):
        read_text(tmp_path / "latin.txt", files)
