"""Which tokens end an answer: the sources are read, a disagreement is told and resolved, nonsense is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from exporter.errors import TokenizerError
from exporter.pipeline.plan import make_plan
from exporter.recipe import Execution
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.tokens.end_tokens import stop_tokens
from tests.exports import export_to, recipe, refused
from tests.folders import DELETED, copy, edit_json
from tests.merged import export_gguf, merged_model, metadata_of

# Ids of <|endoftext|> and <|im_end|> in the tests' tokenizer.
END_OF_TEXT, IM_END = 381, 383


@pytest.fixture
def base(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    return copy(make_base("qwen2"), tmp_path / "base")


def say(base: Path, config: Any = None, generation: Any = None) -> None:
    edit_json(base / "config.json", eos_token_id=config)
    edit_json(base / "generation_config.json", eos_token_id=generation)


def test_sources_that_agree_change_nothing(base: Path, tmp_path: Path) -> None:
    say(base, IM_END, [IM_END, END_OF_TEXT])
    stops = stop_tokens(merged_model(base))
    assert (stops.config, stops.generation_config) == ((IM_END,), (IM_END, END_OF_TEXT))
    assert (stops.tokenizer, stops.template) == ((IM_END,), (IM_END,))
    assert stops.agree
    assert stops.end_of_turn == IM_END
    export_to(tmp_path / "out", base)
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert make_plan(recipe(base, (), tmp_path / "new"), Execution()).artifacts[0].notes == ()


@pytest.mark.parametrize(
    ("config", "generation"),
    [(END_OF_TEXT, END_OF_TEXT), (END_OF_TEXT, None), (None, None), (IM_END, END_OF_TEXT)],
)
def test_a_disagreement_is_in_the_plan_and_the_folder_stops_on_all(
    base: Path, tmp_path: Path, config: int | None, generation: int | None
) -> None:
    say(base, config, generation)
    edit_json(base / "generation_config.json", top_k=7)
    artifact = make_plan(recipe(base, (), tmp_path / "out"), Execution()).artifacts[0]
    (note,) = artifact.notes
    assert "disagree" in note
    assert f"chat template {IM_END}" in note
    export_to(tmp_path / "out", base)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == {config, generation, IM_END} - {None}
    assert written["top_k"] == 7


def test_without_a_generation_config_the_config_counts(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").unlink()
    assert stop_tokens(merged_model(base)).agree
    edit_json(base / "config.json", eos_token_id=END_OF_TEXT)
    export_to(tmp_path / "out", base)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [END_OF_TEXT, IM_END]}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [400, -1, [IM_END, 10**6], "<|im_end|>", True, 1.0])
def test_an_id_outside_of_the_vocabulary_is_refused(base: Path, tmp_path: Path, file: str, value: Any) -> None:
    edit_json(base / file, eos_token_id=value)
    error = refused(TokenizerError, tmp_path / "out", base)
    assert error.thing == f"{file}: eos_token_id"


def test_the_token_after_an_answer_is_found(base: Path) -> None:
    template = base / "chat_template.jinja"
    end = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} <|endoftext|>{% endfor %}"
    for source, expected in (
        (end, (END_OF_TEXT,)),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", (IM_END,)),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ()),
        ("{{ raise_exception('no') }}", ()),
        ("{% for m in %}", ()),
    ):
        template.write_text(source)
        assert stop_tokens(merged_model(base)).template == expected


def test_a_gguf_stops_on_an_end_of_turn_that_llama_cpp_does_not_know(base: Path, tmp_path: Path) -> None:
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["added_tokens"][2]["content"] = "<|done|>"
    vocabulary = definition["model"]["vocab"]
    if "<|im_end|>" in vocabulary:
        vocabulary["<|done|>"] = vocabulary.pop("<|im_end|>")
    edit_json(base / "tokenizer.json", **definition)
    edit_json(base / "tokenizer_config.json", eos_token="<|endoftext|>", added_tokens_decoder={})
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|done|>"))
    say(base, END_OF_TEXT, [END_OF_TEXT, IM_END])
    file = export_gguf(base, tmp_path / "out")
    assert metadata_of(file)["tokenizer.ggml.eos_token_id"] == END_OF_TEXT
    assert metadata_of(file)[gguf.Keys.Tokenizer.EOT_ID] == IM_END
    with LlamaCpp().session(file, 64) as session:
        assert session.stops_on(IM_END)
        assert session.stops_on(END_OF_TEXT)
        assert not session.stops_on(5)


def test_a_usual_gguf_needs_no_such_key(base: Path, tmp_path: Path) -> None:
    edit_json(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    file = export_gguf(base, tmp_path / "out")
    assert gguf.Keys.Tokenizer.EOT_ID not in metadata_of(file)
    with LlamaCpp().session(file, 64) as session:
        assert session.stops_on(IM_END)


def test_a_model_without_any_end_says_so(base: Path) -> None:
    say(base)
    edit_json(base / "tokenizer_config.json", eos_token=DELETED)
    (base / "chat_template.jinja").unlink()
    stops = stop_tokens(merged_model(base))
    assert stops.all == ()
    assert stops.agree
    assert stops.end_of_turn is None
