"""An artifact that answers: a sound one passes, and each fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.merge.model import MergedModel
from exporter.plan.reporter import Reporter
from exporter.runtimes.base import Continuation
from exporter.runtimes.registry import load_runtime
from exporter.tokens.prompt_texts import TEXTS
from exporter.tokens.prompts import LONG, MAX_NEW
from exporter.verify.answers.ask import NORMALIZED, UNNORMALIZED
from exporter.verify.answers.follow import Followed, follow
from exporter.verify.answers.judge import MAX_SHORTFALL, Answers, judge_answers, loop_of
from exporter.verify.answers.run import Served, WalkedModel, answers_of
from tests.commands import invoke
from tests.exports import export_to
from tests.folders import copy, edit_json, edit_tensors
from tests.merged import export_gguf, load_peft, merged_model, random_windows


@pytest.fixture(scope="session")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.fixture(scope="session")
def model(base: Path) -> MergedModel:
    return merged_model(base)


@pytest.fixture(scope="session")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(base, tmp_path_factory.mktemp("answers") / "gguf")


@pytest.fixture(scope="session")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(base, tmp_path_factory.mktemp("answers") / "folder", "safetensors")


def exported(base: Path, out: Path, format_: str) -> Path:
    """What a runtime loads of a base in that format, nothing of it rounded."""
    if format_ == "gguf":
        return export_gguf(base, out)
    export_to(out, base, quant="fp32")
    return out


def answers(model: MergedModel, entry: Path) -> Answers:
    runtime = load_runtime("llamacpp" if entry.suffix == ".gguf" else "transformers")
    (found,) = answers_of(WalkedModel(model, "cpu"), [Served("it", entry, runtime)], Reporter())
    assert isinstance(found, Answers)
    return found


def patched(file: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy of a file with some bytes replaced by as many others."""
    content = file.read_bytes()
    assert len(old) == len(new)
    assert old in content
    target.write_bytes(content.replace(old, new, 1))
    return target


# --- sound artifacts -----------------------------------------------------------------------------------------------


def test_a_sound_folder_answers_as_the_model_does(model: MergedModel, folder: Path) -> None:
    found = answers(model, folder)
    assert found.faults == ()
    assert found.asked.differing == ()
    assert found.asked.explained == {}
    assert found.asked.texts == 2 * (len(TEXTS) + 3)
    assert found.asked.stops
    assert found.asked.stop_evidence == "generation"
    for followed in found.followed.values():
        assert followed.shortfall.max() < 1e-3


def test_a_class_that_normalizes_where_tokenizer_json_does_not_is_explained(base: Path, tmp_path: Path) -> None:
    """transformers' own doing, in every folder of such a model, the trained one's too."""
    bare = copy(base, tmp_path / "base")
    edit_json(bare / "tokenizer.json", normalizer=None)
    edit_json(bare / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    export_to(tmp_path / "out", bare, quant="fp32")
    found = answers(merged_model(bare), tmp_path / "out")
    assert found.faults == ()
    assert set(found.asked.explained.values()) == {NORMALIZED}


def test_a_sound_gguf_answers_as_the_model_does(model: MergedModel, gguf: Path) -> None:
    found = answers(model, gguf)
    assert found.faults == ()
    # llama.cpp knows no normalizer: only texts that are not NFC may differ, and for that cause alone.
    assert set(found.asked.explained.values()) == {UNNORMALIZED}
    names = {name.partition(" (")[0] for name in found.asked.explained}
    assert "decomposed" in names
    assert names <= {"decomposed", "compatibility", "stacked marks"}
    assert found.asked.stops
    assert {prompt.name for prompt in found.question.prompts} == {"short", "chat", "answered", "long"}
    for followed in found.followed.values():
        assert followed.shortfall.max() < 1e-2


@pytest.mark.parametrize("format_", ["gguf", "safetensors"])
def test_the_long_prompt_has_2000_tokens_where_the_model_has_the_positions(
    base: Path, tmp_path: Path, format_: str
) -> None:
    roomy = copy(base, tmp_path / "roomy")
    edit_json(roomy / "config.json", max_position_embeddings=4096)
    found = answers(merged_model(roomy), exported(roomy, tmp_path / "out", format_))
    assert found.faults == ()
    (long,) = (prompt for prompt in found.question.prompts if prompt.name == "long")
    assert len(long.ids) == LONG == 2000
    assert found.asked.continuations["long"].tokens
    assert found.followed["long"].shortfall.max() < 1e-2


def test_a_model_without_a_chat_template_is_asked_without_chats(base: Path, tmp_path: Path) -> None:
    plain = copy(base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    found = answers(merged_model(plain), export_gguf(plain, tmp_path / "out"))
    assert found.faults == ()
    assert set(found.asked.continuations) == {"short", "long"}
    assert found.as_json()["chat_template"] is None


# --- faults --------------------------------------------------------------------------------------------------------


def test_another_pre_tokenizer(model: MergedModel, gguf: Path, tmp_path: Path) -> None:
    other = patched(gguf, tmp_path / "other.gguf", b"\x05\0\0\0\0\0\0\0qwen2\x15", b"\x05\0\0\0\0\0\0\0gpt-2\x15")
    found = answers(model, other)
    assert found.faults[0].startswith(f"tokenization differs on {len(found.asked.differing)} of ")
    # With so few merges, little else is split otherwise.
    assert "newlines" in found.asked.differing


def test_the_chat_template_of_another_model_in_a_gguf(model: MergedModel, gguf: Path, tmp_path: Path) -> None:
    other = patched(gguf, tmp_path / "other.gguf", b"<|im_start|>assistant", b"<|im_start|>Assistant")
    assert any("the chat template renders" in fault for fault in answers(model, other).faults)


def test_the_chat_template_of_another_model_in_a_folder(model: MergedModel, folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}")
    assert any("the chat template renders" in fault for fault in answers(model, other).faults)


def test_no_chat_template_where_the_source_has_one(model: MergedModel, folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    found = answers(model, other)
    assert len(found.asked.rendered_otherwise) == found.asked.conversations


def test_the_eos_of_another_model(model: MergedModel, folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other")
    edit_json(other / "generation_config.json", eos_token_id=7)
    ending = model.config["eos_token_id"]
    assert f"an answer does not stop on the token that ends a turn, {ending}" in answers(model, other).faults


def test_a_tokenizer_that_splits_otherwise_in_a_folder(model: MergedModel, folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other")
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    definition["model"]["merges"] = definition["model"]["merges"][:10]
    edit_json(other / "tokenizer.json", **definition)
    assert any("tokenization differs" in fault for fault in answers(model, other).faults)


@pytest.mark.parametrize("format_", ["gguf", "safetensors"])
def test_a_model_that_repeats_one_token(make_base: Callable[..., Path], tmp_path: Path, format_: str) -> None:
    sound = make_base("qwen3", tied=False)
    stuck = copy(sound, tmp_path / "stuck")

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].zero_()[0] = 1.0
        head = tensors["lm_head.weight"].zero_()
        # One of the two is the likeliest, whatever the hidden state's sign.
        head[5, 0], head[6, 0] = 50.0, -50.0

    edit_tensors(stuck / "model.safetensors", repeat)
    found = answers(merged_model(sound), exported(stuck, tmp_path / "out", format_))
    assert any("over and over, where the reference would not" in fault for fault in found.faults)


def test_a_fault_keeps_an_artifact_from_being_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the pipeline: what llama.cpp would tokenize otherwise is rejected, with the reason in the manifest."""
    from exporter.backends.gguf.metadata import tokenizer_keys as vocabulary

    monkeypatch.setattr(vocabulary, "PRE_TOKENIZERS", dict.fromkeys(vocabulary.PRE_TOKENIZERS, "gpt-2"))
    values: dict[str, Any] = {
        "calibration": {"text": Path(__file__)}, "evaluation": {"tokens": 128, "n_ctx": 64}, "verify": True,
    }  # fmt: skip
    result = export_to(tmp_path / "out", base, format="gguf", quant="F32", **values)
    assert not result.passed
    artifact = result.folders[0].manifest["artifacts"][0]
    assert artifact["answers"]["broken"] == artifact["verification"]["broken"]
    assert "tokenization differs" in artifact["verification"]["broken"][0]


def test_without_answers_nothing_is_asked(base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "calibration": {"text": Path(__file__)}, "evaluation": {"tokens": 128, "n_ctx": 64, "answers": False},
        "verify": True,
    }  # fmt: skip
    result = export_to(tmp_path / "out", base, format="gguf", quant="F32", **values)
    assert result.passed
    assert result.folders[0].manifest["artifacts"][0]["answers"] is None
    assert result.folders[0].manifest["recipe"]["evaluation"]["answers"] is False


# --- the parts -----------------------------------------------------------------------------------------------------


def test_the_reference_along_continuations_is_the_whole_model(base: Path, make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter(base)
    ids = random_windows(3, 24, 384).ids
    wanted = [(ids[0][:8], ids[0][8:20]), (ids[0][:8], ids[1][:3]), (ids[2][:15], ids[2][15:16])]
    found = follow(merged_model(base, adapter), wanted, "cpu")
    whole = load_peft(base, adapter)
    for prompt, continuation in wanted:
        with torch.no_grad():
            logits = whole(input_ids=torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1].double()
        one = found[prompt, continuation]
        assert one.likeliest.tolist() == logits.argmax(1).tolist()
        chosen = logits[torch.arange(len(continuation)), torch.tensor(continuation)]
        best = logits.topk(2, dim=1).values
        assert np.abs(one.shortfall - (best[:, 0] - chosen).numpy()).max() < 1e-4
        assert np.abs(one.margin - (best[:, 0] - best[:, 1]).numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("tokens", "period", "start"),
    [
        ([7] * 16, 1, 0),
        ([1, 2, 3] + [7] * 16, 1, 3),
        ([1, 2, 3] + [7] * 15, 0, 18),
        ([9] + [1, 2] * 8, 2, 1),
        ([9] + [1, 2, 3, 4] * 4, 4, 1),
        ([1, 2, 3, 4, 5] * 6, 0, 30),
        ([7] * 20 + [1], 0, 21),
        ([], 0, 0),
    ],
)
def test_loops(tokens: list[int], period: int, start: int) -> None:
    assert loop_of(tokens) == (period, start)


def followed(shortfall: list[float]) -> Followed:
    values = np.array(shortfall)
    return Followed(np.zeros(len(shortfall), np.int64), values, np.ones(len(shortfall)))


def test_what_fails_and_what_is_reported(model: MergedModel, gguf: Path) -> None:
    sound = answers(model, gguf)

    def faults(tokens: list[int], shortfall: list[float], *, stopped: bool = False) -> tuple[str, ...]:
        asked = replace(sound.asked, continuations={"short": Continuation(tuple(tokens), stopped)})
        return judge_answers(asked, sound.question, {"short": followed(shortfall)}).faults

    various = list(range(MAX_NEW))
    assert faults(various, [0.0] * 32) == ()
    # Near ties go one way or the other: reported, not failed.
    assert faults(various, [0.0, 0.3] * 16) == ()
    assert faults(various, [MAX_SHORTFALL] * 32) == ()
    assert "1.60 nats" in faults(various, [1.6] * 32)[0]
    assert faults(various, [0.0] * 31 + [float("nan")])
    # One token of an answer that ends at once is no mean.
    assert faults([5], [3.0], stopped=True) == ()
    # A loop is a fault where the reference would not go round, or would not have gone in.
    assert faults([5] * 32, [0.0] * 32) == ()
    assert "repeats one token" in faults([5] * 32, [0.1] * 32)[0]
    assert "repeats one token" in faults([5] * 32, [9.0] * 2 + [0.0] * 30)[0]
    assert "repeats 2 tokens" in faults([5, 6] * 16, [9.0] * 4 + [0.0] * 28)[0]
    ending = sound.asked.end_of_turn
    assert ending is not None
    assert "goes on after" in faults([1, ending, *range(30)], [0.0] * 32)[0]
    assert faults([1, 2, ending], [0.0] * 3, stopped=True) == ()
    assert "no token follows" in faults([], [])[0]


def test_no_answers_goes_with_a_recipe_and_with_verify(base: Path, tmp_path: Path) -> None:
    settings = {
        "base": str(base), "outputs": [{"format": "gguf", "quant": "F32", "out": str(tmp_path / "out")}],
        "calibration": {"text": __file__}, "evaluation": {"tokens": 128, "n_ctx": 64},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    assert invoke("export", tmp_path / "recipe.yaml", "--no-answers", "--quiet").exit_code == 0
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["recipe"]["evaluation"]["answers"] is False
    options = ("--base", base, "--calibration", __file__, "--eval-tokens", "128", "--eval-window", "64", "--json")
    for flags, asked in (((), True), (("--no-answers",), False)):
        result = invoke("verify", tmp_path / "out", *options, *flags)
        assert result.exit_code == 0
        assert (json.loads(result.stdout)["gguf F32"]["answers"] is not None) == asked
