"""The tokenizer in a GGUF header, against transformers, gguf's `SpecialVocab`, and llama.cpp's tokenizer itself."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
from transformers import AutoTokenizer

from exporter.backends.gguf.metadata.tokenizer_keys import vocabulary_metadata
from exporter.errors import TokenizerError
from exporter.inputs.tokenizer import TokenizerFiles
from tests.folders import copy, edit_json
from tests.merged import merged_model, plan_gguf, write_header

SIZE = 400
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


@pytest.fixture
def folder(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    """A base of its own, to change."""
    return copy(make_base("qwen2"), tmp_path / "base")


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` alter tokenizer.json."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    change(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))


def added(content: str, index: int, *, special: bool, normalized: bool = False) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": content, **flags, "normalized": normalized, "special": special}


def metadata(folder: Path, *adapters: Path, **config: Any) -> dict[str, Any]:
    """The `tokenizer.*` values of a folder, without the types."""
    files = TokenizerFiles.choose(folder, adapters)
    model = json.loads((folder / "config.json").read_text()) | {"vocab_size": SIZE} | config
    return {key: value.value for key, value in vocabulary_metadata(files, model).items()}


def test_tokens_are_the_tokenizer_s_and_the_rest_is_padding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = metadata(folder)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    known = len(tokenizer)
    assert len(tokens) == len(types) == SIZE > known
    assert tokens[:known] == tokenizer.convert_ids_to_tokens(list(range(known)))
    assert tokens[known:] == [f"[PAD{index}]" for index in range(known, SIZE)]
    assert set(types[known:]) == {gguf.TokenType.UNUSED}
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    assert {i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} == special
    assert {kind for i, kind in enumerate(types[:known]) if i not in special} == {gguf.TokenType.NORMAL}
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("content", "special", "expected"),
    [
        ("<tool_call>", False, gguf.TokenType.USER_DEFINED),
        ("<|custom|>", False, gguf.TokenType.CONTROL),
        ("<think>", True, gguf.TokenType.CONTROL),
        ("  two spaces", False, gguf.TokenType.USER_DEFINED),
        ("é我", False, gguf.TokenType.USER_DEFINED),
        # llama.cpp's converter takes these for control tokens whatever the tokenizer says (does_token_look_special).
        ("<pad>", False, gguf.TokenType.CONTROL),
        ("<mask>", False, gguf.TokenType.CONTROL),
        ("<unused7>", False, gguf.TokenType.CONTROL),
    ],
)
def test_types_of_added_tokens(folder: Path, content: str, special: bool, expected: gguf.TokenType) -> None:
    edit_tokenizer(folder, lambda it: it["added_tokens"].append(added(content, 384, special=special)))
    found = metadata(folder)
    assert found["tokenizer.ggml.tokens"][384] == content
    assert found["tokenizer.ggml.token_type"][384] == expected


def _as_strings(definition: dict[str, Any]) -> None:
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]


def _with_spaces(definition: dict[str, Any]) -> None:
    definition["model"]["merges"] += [["a b", " c"], ["Ġ ", "d"]]


@pytest.mark.parametrize("change", [lambda it: None, _as_strings, _with_spaces], ids=["pairs", "strings", "spaces"])
def test_merges_are_gguf_s(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_tokenizer(folder, change)
    expected = gguf.SpecialVocab(folder, load_merges=True).merges
    assert metadata(folder)["tokenizer.ggml.merges"] == expected
    assert len(expected) > 100
    assert all(merge.count(" ") == 1 for merge in expected)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"eos_token": {"content": "<|endoftext|>", "special": True, "__type": "AddedToken"}},
        {"eos_token": None, "pad_token": None},
        {"eos_token": "not a token"},
        {"eos_token": {"no": "content"}},
        {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>", "sep_token": "<|im_end|>"},
        {"mask_token": "<|im_end|>"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "config",
    [{}, {"eos_token_id": 381, "bos_token_id": 382, "pad_token_id": 383}, {"eos_token_id": SIZE}, {"bos_token_id": 0}],
    ids=str,
)
def test_special_ids_are_gguf_s(folder: Path, change: dict[str, Any], config: dict[str, Any]) -> None:
    edit_json(folder / "tokenizer_config.json", **change)
    edit_json(folder / "config.json", **config)
    expected = gguf.SpecialVocab(folder, n_vocab=SIZE).special_token_ids
    found = metadata(folder)
    ids = {role: found.get(f"tokenizer.ggml.{key}_token_id") for role, key in ROLES.items()}
    assert {role: index for role, index in ids.items() if index is not None} == expected


def test_eos_of_the_configuration_may_be_a_list(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert "tokenizer.ggml.eos_token_id" not in metadata(folder, eos_token_id=[383, 381])


@pytest.mark.parametrize(
    ("flag", "post_processor", "expected"),
    [
        (False, {"type": "ByteLevel"}, {"bos": False, "eos": False}),
        # The post-processor does what it does, whatever tokenizer_config.json says of it.
        (True, {"type": "ByteLevel"}, {"bos": False, "eos": False}),
        (True, None, {"bos": True}),
        (False, None, {"bos": False}),
        (None, None, {}),
        (None, {"type": "Sequence", "processors": [{"type": "ByteLevel"}]}, {"bos": False, "eos": False}),
    ],
)
def test_added_roles(folder: Path, flag: bool | None, post_processor: Any, expected: dict[str, bool]) -> None:
    edit_json(folder / "tokenizer_config.json", add_bos_token=flag)
    edit_tokenizer(folder, lambda it: it.update(post_processor=post_processor))
    found = metadata(folder)
    prefix = "tokenizer.ggml.add_"
    roles = {key.removeprefix(prefix).removesuffix("_token"): found[key] for key in found if key.startswith(prefix)}
    assert roles == expected


def test_a_template_that_adds_tokens_to_every_text_is_refused(folder: Path) -> None:
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    step = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    edit_tokenizer(folder, lambda it: it.update(post_processor={"type": "Sequence", "processors": [step]}))
    with pytest.raises(TokenizerError, match="post_processor"):
        metadata(folder)


def _chat(folder: Path) -> str | None:
    found: str | None = metadata(folder).get("tokenizer.chat_template")
    return found


def test_chat_template_of_its_own_file(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    assert _chat(folder) == template
    assert AutoTokenizer.from_pretrained(folder).chat_template == template


def test_chat_template_of_the_file_goes_before_the_one_in_the_configuration(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="in the configuration")
    template = AutoTokenizer.from_pretrained(folder).chat_template
    assert _chat(folder) == template == (folder / "chat_template.jinja").read_text()


def test_chat_template_of_the_configuration(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert _chat(folder) is None
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}\né")
    assert _chat(folder) == gguf.SpecialVocab(folder).chat_template == "{{ messages }}\né"


def test_chat_template_of_a_list_is_the_default_one(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit_json(folder / "tokenizer_config.json", chat_template=templates)
    assert _chat(folder) == "plain"


def test_chat_template_of_the_old_json_file(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert _chat(folder) == gguf.SpecialVocab(folder).chat_template == "old"


def test_chat_template_of_the_adapter_goes_before_the_base_s(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("trained with this")
    assert metadata(folder, adapter)["tokenizer.chat_template"] == "trained with this"
    assert metadata(folder, adapter)["tokenizer.ggml.tokens"] == metadata(folder)["tokenizer.ggml.tokens"]


def test_an_adapter_s_own_tokenizer_is_taken_whole(folder: Path, tmp_path: Path) -> None:
    adapter = copy(folder, tmp_path / "adapter")
    edit_tokenizer(adapter, lambda it: it["added_tokens"].append(added("<|new|>", 384, special=True)))
    edit_json(adapter / "tokenizer_config.json", eos_token="<|new|>")
    found = metadata(folder, adapter)
    assert found["tokenizer.ggml.tokens"][384] == "<|new|>"
    assert found["tokenizer.ggml.eos_token_id"] == 384


def _step(definition: dict[str, Any], index: int) -> dict[str, Any]:
    step: dict[str, Any] = definition["pre_tokenizer"]["pretokenizers"][index]
    return step


@pytest.mark.parametrize(
    "change",
    [
        lambda it: _step(it, 0).update(pattern={"Regex": r"\s+|\S+"}),
        lambda it: _step(it, 0).update(pattern={"String": " "}),
        lambda it: _step(it, 0).update(behavior="Removed"),
        lambda it: _step(it, 1).update(use_regex=True),
        lambda it: _step(it, 1).update(add_prefix_space=True),
        lambda it: it["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
        lambda it: it["pre_tokenizer"]["pretokenizers"].reverse(),
        lambda it: it.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
        lambda it: it.update(pre_tokenizer={"type": "Whitespace"}),
        lambda it: it.update(pre_tokenizer=None),
    ],
    ids=[
        "pattern", "string", "removed", "gpt2-regex", "prefix-space", "digits", "order", "gpt2",
        "whitespace", "none",
    ],
)  # fmt: skip
def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit_tokenizer(folder, change)
    with pytest.raises(TokenizerError, match="pre_tokenizer"):
        metadata(folder)


def test_more_tokens_than_the_embedding_has_rows_are_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="383") as caught:
        metadata(folder, vocab_size=383)
    assert "383" in caught.value.expected
    assert len(metadata(folder, vocab_size=384)["tokenizer.ggml.tokens"]) == 384


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (json.dumps({"model": {"type": "Unigram"}}).encode(), "Unigram"),
        (json.dumps({}).encode(), "model.type"),
    ],
)
def test_another_tokenizer_json_is_refused(folder: Path, content: bytes, match: str) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=match):
        metadata(folder)


def test_no_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no such file"):
        metadata(folder)


def test_no_tokenizer_config_is_fine(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    found = metadata(folder, eos_token_id=383)
    assert found["tokenizer.ggml.eos_token_id"] == 383


TEXTS = (
    "def f(x):\n    return {x: 1234567, 'it''s': \"We're\"}\n\n\n\tprint( f(1) )  \r\n",
    "<|im_start|>user\nWhat's 3.14 + 42?<|im_end|>\n<|im_start|>assistant\n",
    "Ünïcödé Straße 你好，世界 🦙🦙 кириллица ١٢٣ ＡＢＣ",  # noqa: RUF001
    "trailing spaces   \n   leading   \t mixed\u00a0no-break\u2028line",
    "I'LL you'Ve it'd--x==!= ...!!! \n\r\n \n",
    "",
)


@pytest.fixture
def llama_vocabulary(make_base: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A base, and its vocabulary as llama.cpp loads it from the planned header."""
    base = make_base("qwen2")
    file = write_header(plan_gguf(merged_model(base)), tmp_path / "vocabulary.gguf")
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    assert model
    yield base, llama_cpp.llama_model_get_vocab(model)
    llama_cpp.llama_model_free(model)


def test_llama_cpp_tokenizes_like_the_tokenizer(llama_vocabulary: tuple[Path, Any]) -> None:
    base, vocabulary = llama_vocabulary
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in TEXTS:
        raw, buffer = text.encode(), (llama_cpp.llama_token * 1000)()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), buffer, len(buffer), True, True)
        assert list(buffer[:count]) == tokenizer(text).input_ids, text


def test_llama_cpp_finds_the_special_tokens(llama_vocabulary: tuple[Path, Any]) -> None:
    base, vocabulary = llama_vocabulary
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert llama_cpp.llama_vocab_n_tokens(vocabulary) == SIZE
    assert llama_cpp.llama_vocab_eos(vocabulary) == tokenizer.eos_token_id
    assert llama_cpp.llama_vocab_pad(vocabulary) == tokenizer.pad_token_id
    assert not llama_cpp.llama_vocab_get_add_bos(vocabulary)
    assert not llama_cpp.llama_vocab_get_add_eos(vocabulary)
    assert llama_cpp.llama_vocab_is_eog(vocabulary, tokenizer.eos_token_id)
    text = ctypes.string_at(llama_cpp.llama_vocab_get_text(vocabulary, SIZE - 1))
    assert text == f"[PAD{SIZE - 1}]".encode()
