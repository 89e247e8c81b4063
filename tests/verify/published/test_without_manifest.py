"""Artifacts that came without a manifest, judged by a reference pack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ArtifactError, ReferencePackError
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration
from exporter.verify.published.verify import PublishedResult, verify_with_pack
from exporter.verify.published.without_manifest import NOTE, bare_manifest
from tests.commands import invoke
from tests.exports import export_to, pack_to
from tests.folders import copy, edit_json
from tests.merged import merged_model

# A short text, so that tokenizing it takes no time: this file.
TEXT = Calibration(text=Path(__file__))
WIDE: dict[str, Any] = {"hidden": 256, "intermediate": 384, "heads": 4, "kv_heads": 2, "head_dim": 64}

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def base(make_base: Make) -> Path:
    return make_base("qwen2", **WIDE)


@pytest.fixture(scope="session")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scored = {"tokens": 128, "n_ctx": 64}
    return pack_to(tmp_path_factory.mktemp("pack") / "pack", base, calibration=TEXT.model_dump(), evaluation=scored)


@pytest.fixture(scope="session")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each format without its manifest; to be copied before it is changed."""
    parent = tmp_path_factory.mktemp("made")
    types = {"gguf": "Q8_0", "safetensors": "fp32", "gptq": "gptq-int4-g128"}
    for format_, quant in types.items():
        values: dict[str, Any] = {"format": format_, "quant": quant, "name": "model"}
        export_to(parent / format_, base, **values, calibration={"tokens": 512, "window": 64})
        (parent / format_ / "export.json").unlink()
    return {"gguf": parent / "gguf" / "model-Q8_0.gguf"} | {name: parent / name for name in ("safetensors", "gptq")}


def judged(artifact: Path, pack: Path, runtime: str | None = None) -> PublishedResult:
    return verify_with_pack(artifact, pack, {}, runtime, "cpu", Reporter())


@pytest.mark.parametrize(("format_", "runtime"), [("gguf", None), ("safetensors", "transformers")])
def test_it_is_judged(made: dict[str, Path], pack: Path, format_: str, runtime: str | None) -> None:
    result = judged(made[format_], pack, runtime)
    label = {"gguf": "gguf Q8_0", "safetensors": "safetensors fp32"}[format_]
    assert result.passed
    assert list(result.verdicts) == [label]
    assert result.notes == (NOTE,)
    assert result.as_json()[label]["by_reference"] is True
    figures = result.verdicts[label].comparison
    assert figures is not None
    assert figures.divergence is not None
    assert figures.divergence.mean < 0.01


def test_formats_types_and_parameters(made: dict[str, Path], base: Path) -> None:
    vocabulary = merged_model(base).config["vocab_size"]
    whole = merged_model(base).parameters
    found = {name: bare_manifest(path, vocabulary) for name, path in made.items()}
    assert {name: (one.artifacts[0].format, one.artifacts[0].quant) for name, one in found.items()} == {
        "gguf": ("gguf", "Q8_0"), "safetensors": ("safetensors", "fp32"), "gptq": ("gptq", "gptq-int4-g128"),
    }  # fmt: skip
    assert {one.merge.parameters for one in found.values()} == {whole}


def test_the_command_says_that_it_passed_by_a_reference(made: dict[str, Path], pack: Path, tmp_path: Path) -> None:
    done = invoke("verify", made["gguf"], "--reference", pack)
    assert done.exit_code == 0
    assert "passed by reference" in done.stderr
    assert NOTE in " ".join(done.stderr.split())
    done = invoke("verify", made["gguf"], "--reference", pack, "--report", tmp_path / "page.html")
    assert done.exit_code == 2
    assert "without an export.json" in done.stderr
    done = invoke("verify", made["gguf"], "--base", "anything")
    assert done.exit_code == 2
    assert "a file by itself" in done.stderr


def test_another_vocabulary_is_refused(made: dict[str, Path], pack: Path, tmp_path: Path, make_base: Make) -> None:
    changed = copy(made["safetensors"], tmp_path / "changed")
    edit_json(changed / "config.json", vocab_size=300)
    with pytest.raises(ReferencePackError) as caught:
        judged(changed, pack, "transformers")
    assert caught.value.found == "300 tokens"


def test_what_does_not_say_what_it_is_is_refused(made: dict[str, Path], pack: Path, tmp_path: Path) -> None:
    others = [{"quant_method": "awq"}, {"quant_method": None}, {"bits": None}, {"bits": 5}, {"group_size": "128"}]
    for number, other in enumerate(others):
        changed = copy(made["gptq"], tmp_path / str(number))
        config = json.loads((changed / "config.json").read_text())
        edit_json(changed / "config.json", quantization_config=config["quantization_config"] | other)
        with pytest.raises(ArtifactError, match="quantization_config"):
            judged(changed, pack, "transformers")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(made["safetensors"] / "config.json", empty)
    with pytest.raises(ArtifactError, match="no safetensors file"):
        judged(empty, pack, "transformers")
    text = tmp_path / "model.gguf"
    text.write_text("GGUF it is not")
    with pytest.raises(ArtifactError):
        judged(text, pack)
