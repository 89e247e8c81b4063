"""What a reference pack judges beside scores, where neither base nor adapter is: files and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.errors import ReferencePackError, UnsupportedModelError
from exporter.plan.reference_pack import model_documents
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration
from exporter.reference.pack.description import read_description
from exporter.reference.pack.model_files import packed_model
from exporter.reference.pack.reader import opened_pack
from exporter.reference.pack.writer import STAGING_KEY
from exporter.runtimes.base import Continuation
from exporter.tokens.end_tokens import StopTokens
from exporter.verify.answers.ask import Asked
from exporter.verify.answers.follow import Followed, follow, follow_first
from exporter.verify.answers.judge import MAX_SHORTFALL, judge_answers
from exporter.verify.answers.question import Question
from exporter.verify.gate import Verification
from exporter.verify.published.verify import verify_with_pack
from tests.commands import invoke
from tests.exports import export_to, pack_to
from tests.folders import copy, edit_json, hashes, rehash
from tests.merged import load_peft, merged_model

# A short text, so that tokenizing it takes no time: this file.
TEXT = Calibration(text=Path(__file__))

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def inputs(make_base: Make, make_adapter: Make) -> tuple[Path, Path]:
    base = make_base("qwen3")
    return base, make_adapter(base)


def write(out: Path, base: Path, adapter: Path, **evaluation: Any) -> Path:
    scored = {"tokens": 128, "n_ctx": 64} | evaluation
    return pack_to(out, base, adapter, calibration=TEXT.model_dump(), evaluation=scored)


@pytest.fixture(scope="session")
def pack(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pack") / "pack", *inputs)


@pytest.fixture(scope="session")
def made(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published folder of each of two formats; and a GGUF file without one, `model.gguf`."""
    parent = tmp_path_factory.mktemp("made")
    for format_, quant in (("gguf", "F32"), ("safetensors", "fp32")):
        export_to(parent / format_, *inputs, format=format_, quant=quant, name="model")
    shutil.copy(parent / "gguf" / "model-F32.gguf", parent / "model.gguf")
    return parent


def judged(artifact: Path, pack: Path, *, answers: bool = True) -> Verification:
    runtime = "transformers" if (artifact / "config.json").is_file() else "llamacpp"
    (found,) = verify_with_pack(artifact, pack, {}, runtime, "cpu", Reporter(), answers=answers).verdicts.values()
    return found


@pytest.mark.parametrize("name", ["model.gguf", "gguf", "safetensors"])
def test_a_sound_artifact_passes_and_is_asked(made: Path, pack: Path, name: str) -> None:
    found = judged(made / name, pack)
    assert found.passed, found.broken
    assert found.answers is not None
    assert found.answers.asked.conversations > 3
    assert found.answers.asked.stops
    assert {name: len(one.shortfall) for name, one in found.answers.followed.items()} == dict.fromkeys(
        ("short", "chat", "answered", "long"), 1
    )
    assert max(one.shortfall[0] for one in found.answers.followed.values()) < 1e-2
    assert "short not before 1" in found.answers.summary()


def changed(folder: Path, target: Path, file: str, change: Callable[[Path], object]) -> Path:
    """A copy of a published folder, a file of which was changed before its hash was taken: as of a faulty exporter."""
    copy(folder, target)
    change(target / file)
    rehash(target / "export.json", file)
    return target


def patch(file: Path, old: bytes, new: bytes) -> None:
    """Replace some bytes by as many others."""
    content = file.read_bytes()
    assert len(old) == len(new)
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "config.json: rms_norm_eps is 1e-05 and should be 1e-06"),
        ("generation_config.json", {"eos_token_id": 3}, "generation_config.json"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "tokenizer_config.json: chat_template"),
    ],
)
def test_a_folder_that_says_something_else_fails(
    made: Path, pack: Path, tmp_path: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    folder = changed(made / "safetensors", tmp_path / "out", file, lambda path: edit_json(path, **changes))
    found = judged(folder, pack, answers=False)
    assert not found.passed
    assert any(reason in one for one in found.broken), found.broken


def test_another_chat_template_fails_by_file_and_by_rendering(made: Path, pack: Path, tmp_path: Path) -> None:
    folder = changed(
        made / "safetensors",
        tmp_path / "out",
        "chat_template.jinja",
        lambda path: path.write_text("Once. " + path.read_text()),
    )
    found = judged(folder, pack)
    assert "chat_template.jinja is not the source's" in found.broken
    assert any("conversations otherwise" in one for one in found.broken), found.broken


def test_a_header_that_says_something_else_fails(made: Path, pack: Path, tmp_path: Path) -> None:
    folder = changed(
        made / "gguf", tmp_path / "out", "model-F32.gguf", lambda file: patch(file, b"<|im_start|>", b"<|im_stort|>")
    )
    found = judged(folder, pack)
    assert not found.passed
    assert any("tokenizer.ggml.tokens" in one for one in found.broken), found.broken


def test_a_tensor_that_is_cut_off_fails(made: Path, pack: Path, tmp_path: Path) -> None:
    folder = changed(
        made / "safetensors",
        tmp_path / "out",
        "model.safetensors",
        lambda file: file.write_bytes(file.read_bytes()[:-8]),
    )
    found = judged(folder, pack, answers=False)
    assert "is cut off" in found.broken[0]
    assert found.not_scored is not None


def test_what_a_file_without_a_manifest_says_in_other_words_is_told(made: Path, pack: Path, tmp_path: Path) -> None:
    """It may be another program's, which writes other keys, or have a Modelfile of somebody's beside it."""
    shutil.copy(made / "model.gguf", tmp_path / "model.gguf")
    (tmp_path / "Modelfile").write_text("FROM ./another.gguf\nSYSTEM Be brief.\n")
    done = invoke("verify", tmp_path / "model.gguf", "--reference", pack)
    assert done.exit_code == 0, done.stderr
    assert "its files say otherwise than the pack: Modelfile: FROM" in done.stderr
    folder = copy(made / "safetensors", tmp_path / "folder")
    (folder / "export.json").unlink()
    edit_json(folder / "config.json", transformers_version="4.0.0", rms_norm_eps=1e-5)
    result = verify_with_pack(folder, pack, {}, "transformers", "cpu", Reporter(), answers=False)
    assert any("transformers_version" in note and "rms_norm_eps" in note for note in result.notes)
    (verdict,) = result.verdicts.values()
    assert verdict.weights is not None
    assert verdict.weights.faults == ()


def test_another_architecture_without_a_manifest_is_scored(
    made: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise UnsupportedModelError("OtherForCausalLM", found="no family", expected="one", remedy="None.")

    monkeypatch.setattr("exporter.backends.gguf.backend.GgufBackend.read", unknown)
    result = verify_with_pack(made / "model.gguf", pack, {}, None, "cpu", Reporter(), answers=False)
    assert result.passed
    assert any("its weights were not looked at" in note for note in result.notes)


def test_the_command_fails_it_and_its_page_says_why(made: Path, pack: Path, tmp_path: Path) -> None:
    out = changed(
        made / "safetensors", tmp_path / "out", "config.json", lambda file: edit_json(file, rms_norm_eps=1e-5)
    )
    page = tmp_path / "page.html"
    done = invoke(
        "verify", out, "--reference", pack, "--runtime", "transformers", "--no-answers", "--report", page
    )  # fmt: skip
    assert done.exit_code == 3, done.stderr
    assert "rms_norm_eps" in done.stderr
    assert "The files are not what base and adapter make." in page.read_text()
    assert "Held against a reference pack" in page.read_text()


def test_answers_may_be_left_out(made: Path, pack: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert judged(made / "model.gguf", pack, answers=False).answers is None
    without = write(tmp_path / "without", *inputs, answers=False)
    assert read_description(without).prompts == {}
    found = judged(made / "model.gguf", without)
    assert found.passed, found.broken
    # What needs no prompt is asked all the same.
    assert found.answers is not None
    assert found.answers.asked.continuations == {}
    assert found.answers.asked.stops
    assert found.answers.asked.conversations > 3


def test_its_first_tokens_are_those_of_the_walk(inputs: tuple[Path, Path], pack: Path) -> None:
    description = read_description(pack)
    with opened_pack(pack, description, "model", "cpu", 1) as opened:
        prompts, reference = opened.prompts, opened.reference
        assert reference.prompts is not None
        wanted = [(prompt.ids, (token, 7)) for prompt in prompts for token in (3, 11)]
        first = follow_first(reference.head, reference.prompts, [one.ids for one in prompts], wanted)
    assert {one.name: len(one.ids) for one in prompts} == description.prompts
    whole = follow(merged_model(*inputs), wanted, "cpu")
    assert first.keys() == whole.keys()
    for key, found in first.items():
        assert found.likeliest.tolist() == whole[key].likeliest[:1].tolist()
        np.testing.assert_allclose(found.shortfall, whole[key].shortfall[:1], atol=1e-4)
        np.testing.assert_allclose(found.margin, whole[key].margin[:1], atol=1e-4)


def test_its_states_are_those_of_peft_unmerged(inputs: tuple[Path, Path], pack: Path) -> None:
    """Read by safetensors' own loader: states of the last token of each prompt, whose logits are peft's."""
    stored = load_file(pack / "prompts.safetensors")
    head = load_file(pack / "head.safetensors")["head"].float()
    lengths = json.loads((pack / "reference.json").read_text(encoding="utf-8"))["prompts"]
    prompts = torch.split(stored["prompt_ids"].long(), list(lengths.values()))
    model = load_peft(*inputs)
    for ids, state in zip(prompts, stored["prompt_states"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -1]
        assert (head @ state - logits).abs().max() < 1e-4


def test_a_packed_model_is_the_merged_one_without_weights(inputs: tuple[Path, Path], pack: Path) -> None:
    ours, theirs = packed_model(pack, "model", read_description(pack).files), merged_model(*inputs)
    assert [(one.name, one.shape, one.source.dtype) for one in ours.tensors] == [
        (one.name, one.shape, one.source.dtype) for one in theirs.tensors
    ]
    assert ours.config == theirs.config
    assert (ours.untied, ours.parameters) == (theirs.untied, theirs.parameters)
    assert ours.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert not ours.tensors[0].source.file.exists()


def test_a_file_that_was_added_to_its_model_is_refused(made: Path, pack: Path, tmp_path: Path) -> None:
    changed = copy(pack, tmp_path / "changed")
    (changed / "model" / "added_tokens.json").write_text("{}")
    with pytest.raises(ReferencePackError, match=r"model/added_tokens\.json"):
        judged(made / "model.gguf", changed, answers=False)


def test_files_of_a_killed_run_are_not_in_it(inputs: tuple[Path, Path], pack: Path, tmp_path: Path) -> None:
    left = tmp_path / ".pack.staging"
    (left / "files" / "model").mkdir(parents=True)
    (left / "files" / "model" / "added_tokens.json").write_text("{}")
    (left / "key").write_text(STAGING_KEY)
    assert hashes(write(tmp_path / "pack", *inputs)) == hashes(pack)


def test_where_the_base_lay_is_not_in_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    edit_json(base / "config.json", _name_or_path="/home/someone/base")
    assert b"someone" not in b"".join(model_documents(merged_model(base)).values())


# --- beginnings ------------------------------------------------------------------------------------------------------


def verdict(tokens: tuple[int, ...], shortfall: list[float]) -> tuple[str, ...]:
    """The faults of one continuation of which so much is known."""
    stops = StopTokens((), None, (), ())
    question = Question({}, {}, {}, (), stops)
    asked = Asked(0, (), {}, 0, (), {"short": Continuation(tokens, False)}, None, None, "", ())
    known = np.array(shortfall)
    followed = Followed(np.zeros(len(known), dtype=np.int64), known, np.ones(len(known)))
    return judge_answers(asked, question, {"short": followed}).faults


@pytest.mark.parametrize(
    ("tokens", "shortfall", "words"),
    [
        (tuple(range(32)), 0.0, ""),
        (tuple(range(32)), 8 * MAX_SHORTFALL - 0.1, ""),
        (tuple(range(32)), 8 * MAX_SHORTFALL + 0.1, "less likely"),
        ((0,) * 32, 0.0, ""),
        # As if the reference chose the second token of the way in itself: the whole would not fail by less.
        ((0,) * 32, 2 * MAX_SHORTFALL - 0.1, ""),
        ((0,) * 32, 2 * MAX_SHORTFALL + 0.1, "over and over"),
        # It loops after its first token, of which alone something is known.
        ((1, *(0,) * 31), 2 * MAX_SHORTFALL + 0.1, ""),
        (tuple(range(32)), float("nan"), "less likely"),
    ],
)
def test_what_is_known_of_a_first_token_decides(tokens: tuple[int, ...], shortfall: float, words: str) -> None:
    faults = verdict(tokens, [shortfall])
    assert bool(faults) == bool(words)
    assert words in " ".join(faults)


def test_head_and_states_of_one_prompt_do(pack: Path) -> None:
    """By the definition: logits are the product of a state with the head."""
    description = read_description(pack)
    with opened_pack(pack, description, "model", "cpu", 1) as opened:
        (prompt, *_), reference = opened.prompts, opened.reference
        assert reference.prompts is not None
        logits = reference.prompts[0] @ reference.head.rows(0, description.vocabulary).float().T
        found = follow_first(reference.head, reference.prompts[:1], [prompt.ids], [(prompt.ids, (5,))])
    (one,) = found.values()
    assert one.likeliest[0] == int(torch.argmax(logits))
    assert one.shortfall[0] == pytest.approx(float(logits.max() - logits[5]), abs=1e-4)


def test_a_token_beyond_the_head_is_never_the_references(pack: Path) -> None:
    description = read_description(pack)
    with opened_pack(pack, description, "model", "cpu", 1) as opened:
        (prompt, *_), reference = opened.prompts, opened.reference
        assert reference.prompts is not None
        wanted = [(prompt.ids, (description.vocabulary, 1))]
        (found,) = follow_first(reference.head, reference.prompts[:1], [prompt.ids], wanted).values()
    assert found.shortfall.tolist() == [np.inf]
    assert found.first_divergence == 0
