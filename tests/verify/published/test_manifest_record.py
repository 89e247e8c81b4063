"""What verification goes by of a published folder: runtime and tokens are those of its export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exporter.compare.speed import measure_folders
from exporter.errors import RecipeError
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.libraries import gptqmodel
from exporter.pipeline.plan import make_plan
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration, Evaluation, Execution
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.registry import choose_runtime
from exporter.runtimes.vllm import runtime as vllm
from exporter.tokens.embedded import embedded_text
from exporter.tokens.windows import TokenSets, make_token_sets, make_windows
from exporter.verify.published.manifest_record import PublishedArtifact, PublishedManifest
from exporter.verify.published.verify import verify_published
from tests.exports import recipe
from tests.vllm_server import make_environment

ARTIFACT = PublishedArtifact(format="gptq", quant="x", entry=".", runtimes=["vllm", "transformers"], bytes=1)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM is here and multiplies with 4 bits alone; transformers loads GPTQ."""
    monkeypatch.setenv(vllm.ENVIRONMENT, str(make_environment(tmp_path / "serve")))
    monkeypatch.setattr(vllm, "missing_kernel", missing_kernel)
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ())


def missing_kernel(packed: Collection[PackedWeights]) -> str | None:
    """In place of vLLM's own."""
    if experts := sorted({one.bits for one in packed if one.experts}):
        return f"no kernel for experts of {' and '.join(map(str, experts))} bits"
    return "no kernel for 8 bits" if 8 in {one.bits for one in packed} else None


def folder_of(folder: Path, quantization: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    ("quantization", "chosen"),
    [
        ({"bits": 4}, "vllm"),
        ({"bits": 8}, "transformers"),
        ({"bits": 4, "dynamic": {"-:^a$": {}, "+:^b$": {"bits": 8}}}, "transformers"),
        ({"bits": 4, "dynamic": {"-:^a$": {}, "+:^b$": {"group_size": 32}}}, "vllm"),
        ({"bits": 4, "dynamic": None}, "vllm"),
        # What cannot be read is told by whoever loads it.
        ({}, "vllm"),
        (None, "vllm"),
        ("gptq", "vllm"),
    ],
)
def test_bits_are_read_from_the_folder(tmp_path: Path, quantization: Any, chosen: str) -> None:
    folder = folder_of(tmp_path / "out", quantization)
    assert ARTIFACT.runtime(folder) == chosen
    assert ARTIFACT.runtime(folder, endpoint="http://localhost:8000") == "vllm"


def test_a_folder_without_packed_weights_is_scored_by_the_first(tmp_path: Path) -> None:
    assert ARTIFACT.runtime(tmp_path) == "vllm"
    file = ARTIFACT.model_copy(update={"entry": "model.gguf", "runtimes": ["llamacpp"]})
    assert file.runtime(tmp_path) == "llamacpp"


def test_a_runtime_that_is_wanted_and_has_no_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no kernel for 8 bits"):
        ARTIFACT.runtime(folder_of(tmp_path / "out", {"bits": 8}), wanted="vllm")


def test_packed_experts_are_seen_in_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", {"bits": 4})
    names = ("model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.qweight")
    save_file({name: torch.zeros(1) for name in names}, folder / "model-1.safetensors")
    assert ARTIFACT.runtime(folder) == "vllm"
    save_file({"model.layers.0.mlp.experts.3.up_proj.qweight": torch.zeros(1)}, folder / "model-2.safetensors")
    assert ARTIFACT.runtime(folder) == "transformers"


def test_bits_of_experts_are_read_from_the_shapes(tmp_path: Path) -> None:
    """Rules may give them others than the model's, and others than those of the layers beside them."""
    folder = folder_of(tmp_path / "out", {"bits": 8, "dynamic": {"+:^.*experts.*$": {"bits": 4}}})
    experts, other = "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj"
    shapes = {experts: (4, 8), other: (8, 8)}
    tensors = {f"{name}.qweight": torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model-1.safetensors")
    with pytest.raises(RecipeError, match="experts of 8 bits"):
        ARTIFACT.runtime(folder, wanted="vllm")
    # Codes and indices of a layer may be in different files.
    indices = {f"{name}.g_idx": torch.zeros(32, dtype=torch.int32) for name in shapes}
    save_file(indices, folder / "model-2.safetensors")
    with pytest.raises(RecipeError, match="experts of 4 bits"):
        ARTIFACT.runtime(folder, wanted="vllm")
    # What contradicts itself is told by whoever loads it.
    save_file({name: torch.zeros(0, dtype=torch.int32) for name in indices}, folder / "model-2.safetensors")
    assert ARTIFACT.runtime(folder, wanted="transformers") == "transformers"
    with pytest.raises(RecipeError, match="for 8 bits"):
        ARTIFACT.runtime(folder, wanted="vllm")


@pytest.mark.parametrize(
    ("bits", "overrides", "chosen"),
    [
        (4, {}, "vllm"),
        (4, {".*down_proj": {"bits": 8}}, "transformers"),
        # Bits that no layer has do not count.
        (8, {".*": {"bits": 4}}, "vllm"),
        (4, {".*": {"bits": 8}}, "transformers"),
    ],
)
def test_what_an_export_writes_is_scored_by_what_it_planned(
    make_base: Callable[..., Path], tmp_path: Path, bits: int, overrides: dict[str, Any], chosen: str
) -> None:
    base, options = make_base("qwen2"), {"overrides": overrides}
    wanted = {
        "format": "gptq",
        "quant": f"gptq-int{bits}-g32",
        "options": options,
        "calibration": {"tokens": 512, "window": 64},
    }
    plan = make_plan(recipe(base, (), tmp_path / "out", **wanted), Execution())
    (artifact,) = plan.artifacts
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "config.json").write_bytes(artifact.documents["config.json"])
    for file in artifact.files:
        (folder / file.name).write_bytes(file.header)
        os.truncate(folder / file.name, file.nbytes)
    planned = choose_runtime(["vllm", "transformers"], endpoint=None, packed=artifact.packed)
    assert planned == chosen
    assert ARTIFACT.runtime(folder) == planned


def test_verifying_and_measuring_take_the_runtime_of_the_bits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", {"bits": 8})
    artifact = ARTIFACT.model_copy(update={"runtimes": ["vllm"]}).model_dump()
    (folder / "export.json").write_text(
        json.dumps({"name": "model", "merge": {"parameters": 1}, "artifacts": [artifact], "files": {}})
    )
    with pytest.raises(RecipeError, match="no kernel for 8 bits"):
        measure_folders([folder], "cpu", Reporter())
    with pytest.raises(RecipeError, match="no kernel for 8 bits"):
        verify_published(folder, "base", (), Calibration(), Evaluation(), None, "cpu", Reporter())


# --- the tokens of the export --------------------------------------------------------------------------------------

EVALUATION = Evaluation(tokens=256, n_ctx=64, max_tokens=512)


@pytest.fixture
def tokenizer(make_base: Callable[..., Path]) -> TokenizerFiles:
    return TokenizerFiles.choose(make_base("qwen2"), ())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(embedded_text()[:20_000], encoding="utf-8")
    return file


def exported(text: Path | None, tokenizer: TokenizerFiles) -> tuple[PublishedManifest, TokenSets]:
    """What an export of a text records, and its token sets."""
    calibration = Calibration(text=text, tokens=512, window=64, seed=3)
    sets = make_token_sets(calibration, EVALUATION, tokenizer, evaluate=True, calibrate=True)
    assert sets.evaluation is not None
    assert sets.calibration is not None
    recipe = {
        "calibration": {"text": calibration.name, "tokens": 512, "window": 64, "seed": 3},
        "evaluation": {"tokens": 256, "max_tokens": 512, "n_ctx": 64},
    }
    tokens = {
        "evaluation": {"source": sets.evaluation.source, "sha256": sets.evaluation.sha256},
        "calibration": {"source": sets.calibration.source, "sha256": sets.calibration.sha256},
    }
    artifacts = [ARTIFACT.model_dump()]
    manifest = {
        "name": "model",
        "merge": {"parameters": 1},
        "artifacts": artifacts,
        "files": {},
        "recipe": recipe,
        **tokens,
    }
    return PublishedManifest.model_validate(manifest), sets


@pytest.mark.parametrize("embedded", [True, False])
def test_what_is_left_open_is_as_in_the_export(
    tokenizer: TokenizerFiles, text: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    manifest, sets = exported(None if embedded else text, tokenizer)
    monkeypatch.chdir(text.parent)
    found, evaluation = manifest.as_exported(Calibration(), Evaluation(answers=False))
    assert evaluation == EVALUATION.model_copy(update={"answers": False})
    cut, notes = manifest.held_against(found, tokenizer)
    assert not notes
    assert make_windows(found, evaluation, tokenizer, cut=cut) == sets.evaluation


def test_what_is_given_is_taken(tokenizer: TokenizerFiles, text: Path, tmp_path: Path) -> None:
    manifest, _ = exported(text, tokenizer)
    other = tmp_path / "other.txt"
    other.write_text("something else " * 500)
    found, evaluation = manifest.as_exported(Calibration(text=other), Evaluation(tokens=128, gate={"*": 1.0}))
    assert (found.text, evaluation.tokens, evaluation.n_ctx, evaluation.gate) == (other, 128, 64, {"*": 1.0})
    # Nothing of it was calibrated on.
    assert manifest.held_against(found, tokenizer) == (None, [])


@pytest.mark.parametrize("name", ["text.txt", "renamed.txt"])
@pytest.mark.parametrize("n_ctx", [64, 100])
def test_with_more_tokens_than_the_export_had_none_is_scored_that_was_calibrated_on(
    tokenizer: TokenizerFiles, text: Path, name: str, n_ctx: int
) -> None:
    manifest, sets = exported(text, tokenizer)
    assert sets.calibration is not None
    given = text.rename(text.with_name(name))
    found, evaluation = manifest.as_exported(Calibration(text=given), Evaluation(tokens=100_000, n_ctx=n_ctx))
    cut, notes = manifest.held_against(found, tokenizer)
    assert not notes
    scored = [token for one in make_windows(found, evaluation, tokenizer, cut=cut).ids for token in one]
    known = " ".join(map(str, scored))
    assert len(scored) > 2000
    assert not any(" ".join(map(str, one)) in known for one in sets.calibration.ids)
    # They are in the text, and would be scored.
    plain = [token for one in make_windows(found, evaluation, tokenizer).ids for token in one]
    assert any(" ".join(map(str, one)) in " ".join(map(str, plain)) for one in sets.calibration.ids)


@pytest.mark.parametrize("content", ["another text " * 3000, "a short text " * 60])
def test_another_text_of_the_same_name_is_told(tokenizer: TokenizerFiles, text: Path, content: str) -> None:
    manifest, _ = exported(text, tokenizer)
    text.write_text(content)
    found, _ = manifest.as_exported(Calibration(text=text), Evaluation())
    cut, notes = manifest.held_against(found, tokenizer)
    assert cut is None
    assert [note.split(" tokens of ")[0] for note in notes] == ["the evaluation", "the calibration"]
    assert "may be scored" in notes[1]


def test_a_text_that_is_not_here_is_refused(
    tokenizer: TokenizerFiles, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = exported(text, tokenizer)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"text\.txt.*--calibration"):
        manifest.as_exported(Calibration(), Evaluation())
    assert manifest.as_exported(Calibration(text=text), Evaluation())[0].text == text


def test_a_pack_with_more_of_the_calibration_text_than_the_export_scored_is_told(
    tokenizer: TokenizerFiles, text: Path
) -> None:
    manifest, _ = exported(text, tokenizer)
    assert manifest.held_against_pack("text.txt", 256) == manifest.held_against_pack("other.txt", 512) == []
    assert "text.txt" in manifest.held_against_pack("text.txt", 257)[0]
