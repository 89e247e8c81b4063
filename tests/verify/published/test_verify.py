"""`exporter verify`: a published folder is what its manifest says, and scores as it did."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from exporter.errors import ArtifactError, ExporterError, NotEnoughMemoryError, RecipeError, RuntimeScoreError
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration, Evaluation
from exporter.reference.predictions import walk_reference
from exporter.verify.published import verify as published
from exporter.verify.published.files_only import UNREADABLE, FilesResult, verify_files
from exporter.verify.published.verify import PublishedResult, verify_published
from tests.commands import invoke
from tests.exports import export_to
from tests.folders import copy, hashes

# A short text, so that tokenizing it takes no time: this file.
TEXT = Calibration(text=Path(__file__))
EVALUATION = Evaluation(tokens=128, n_ctx=64, answers=False)


@pytest.fixture(scope="session")
def inputs(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    base = make_base("qwen2")
    return base, make_adapter(base)


@pytest.fixture(scope="session")
def good(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published folder of each format, verified; to be copied before it is changed."""
    parent = tmp_path_factory.mktemp("published")
    for format_, quant in (("gguf", ("F32", "F16")), ("safetensors", ("fp32",))):
        result = export_to(
            parent / format_, *inputs, format=format_, quant=quant, name="model",
            verify=True, calibration=TEXT.model_dump(), evaluation=EVALUATION.model_dump(),
        )  # fmt: skip
        assert result.passed
    return {"gguf": parent / "gguf", "safetensors": parent / "safetensors"}


def verify(
    folder: Path, base: Path, *adapters: Path, runtime: str | None = None, evaluation: Evaluation = EVALUATION
) -> PublishedResult:
    names = tuple(map(str, adapters))
    return verify_published(folder, str(base), names, TEXT, evaluation, runtime, "cpu", Reporter())


def test_states_that_do_not_stay_in_memory_are_on_the_disk_for_a_while(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(published, "states_budget", lambda: 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    walk = walk_reference

    def walking(*args: Any, **options: Any) -> Any:
        found = walk(*args, **options)
        made.append(options["scratch"])
        assert any(options["scratch"].iterdir())
        return found

    monkeypatch.setattr(published, "walk_reference", walking)
    result = verify(good["gguf"], *inputs)
    assert result.passed
    assert [folder.parent for folder in made] == [tmp_path]
    assert not any(tmp_path.iterdir())
    manifest = json.loads((good["gguf"] / "export.json").read_text())
    before = {f"gguf {one['quant']}": one["verification"]["perplexity"] for one in manifest["artifacts"]}
    after = {label: found.comparison.perplexity for label, found in result.verdicts.items() if found.comparison}
    assert after == before


def test_too_little_memory_for_the_walk_is_refused(
    good: dict[str, Path], inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(NotEnoughMemoryError) as caught:
        verify(good["gguf"], *inputs)
    # It has no such option.
    assert "--compute-dtype" not in caught.value.remedy


@pytest.mark.parametrize("format_", ["gguf", "safetensors"])
def test_a_good_folder_passes_with_the_figures_of_its_manifest(
    good: dict[str, Path], inputs: tuple[Path, Path], format_: str
) -> None:
    before = hashes(good[format_])
    result = verify(good[format_], *inputs)
    assert result.passed
    manifest = json.loads((good[format_] / "export.json").read_text())
    stored = {f"{a['format']} {a['quant']}": a for a in manifest["artifacts"]}
    assert result.as_json().keys() == result.sizes.keys() == stored.keys()
    for label, found in result.as_json().items():
        assert result.sizes[label] == stored[label]["bytes"]
        for key, value in stored[label]["verification"].items():
            assert found[key] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), key
    assert hashes(good[format_]) == before


def test_the_tokens_are_those_of_the_export_unless_told_otherwise(
    good: dict[str, Path], inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((good["gguf"] / "export.json").read_text())
    monkeypatch.chdir(Path(__file__).parent)
    given = ["--base", str(inputs[0]), "--adapter", str(inputs[1]), "--no-answers", "--json"]
    found = json.loads(invoke("verify", good["gguf"], *given).stdout)["gguf F16"]
    assert (found["evaluation"], found["notes"]) == (manifest["evaluation"], [])
    assert found["kl_divergence"] == manifest["artifacts"][1]["verification"]["kl_divergence"]
    found = json.loads(invoke("verify", good["gguf"], *given, "--eval-tokens", "256").stdout)["gguf F16"]
    assert (found["evaluation"]["windows"], found["evaluation"]["n_ctx"]) == (4, 64)


def test_a_folder_may_be_moved(good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert verify(copy(good["gguf"], tmp_path / "elsewhere"), *inputs).passed


def test_safetensors_may_be_verified_by_name_of_the_runtime(good: dict[str, Path], inputs: tuple[Path, Path]) -> None:
    assert verify(good["safetensors"], *inputs, runtime="transformers").passed


@pytest.mark.parametrize(
    ("format_", "runtime", "error"),
    [
        ("gguf", "transformers", RuntimeScoreError),
        ("safetensors", "llamacpp", RuntimeScoreError),
        ("gguf", "vllm.rs", RecipeError),
    ],
)
def test_a_runtime_that_does_not_serve_the_format_fails(
    good: dict[str, Path], inputs: tuple[Path, Path], format_: str, runtime: str, error: type[ExporterError]
) -> None:
    with pytest.raises(error):
        verify(good[format_], *inputs, runtime=runtime)


def test_without_the_adapter_the_gate_fails(good: dict[str, Path], inputs: tuple[Path, Path]) -> None:
    result = verify(good["gguf"], inputs[0])
    assert not result.passed
    assert all(verdict.broken for verdict in result.verdicts.values())


def test_with_another_adapter_the_gate_fails(
    good: dict[str, Path], inputs: tuple[Path, Path], make_adapter: Callable[..., Path]
) -> None:
    result = verify(good["gguf"], inputs[0], make_adapter(inputs[0], seed=7))
    assert not result.passed
    for found in result.as_json().values():
        assert any("_proj.weight" in reason for reason in found["weights"]["broken"])
        assert set(found["weights"]["broken"]) <= set(found["broken"])


def test_limits_may_be_given(good: dict[str, Path], inputs: tuple[Path, Path]) -> None:
    strict = EVALUATION.model_copy(update={"gate": {"F16": 0.0}})
    result = verify(good["gguf"], *inputs, evaluation=strict)
    assert result.verdicts["gguf F32"].passed
    assert not result.verdicts["gguf F16"].passed
    loose = EVALUATION.model_copy(update={"gate": {"*": 100.0}})
    # Scores may be as far off as one says; the stored weights may not.
    verdicts = verify(good["gguf"], inputs[0], evaluation=loose).verdicts.values()
    assert all(verdict.weights and verdict.broken == verdict.weights.broken != () for verdict in verdicts)
    assert verify(good["gguf"], *inputs, evaluation=loose).passed


def test_one_window_is_refused_where_no_more_can_be_drawn(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8")[:160])
    with pytest.raises(RecipeError, match="at least 128 tokens"):
        verify_published(
            good["gguf"], str(inputs[0]), (str(inputs[1]),), Calibration(text=text), EVALUATION, None, "cpu", Reporter()
        )


def test_a_limit_of_a_type_that_is_not_there_is_refused(good: dict[str, Path], inputs: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match=r"Q4KM.*F32 F16"):
        verify(good["gguf"], *inputs, evaluation=EVALUATION.model_copy(update={"gate": {"Q4KM": 0.01}}))


def test_limits_are_those_of_the_models_size(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export and a later verification count the parameters of the trained model, and say which class it is in."""
    manifest = json.loads((good["safetensors"] / "export.json").read_text())
    assert [a["verification"]["gate"]["size_class"] for a in manifest["artifacts"]] == ["below_1b"]
    monkeypatch.setattr("exporter.plan.gate_limits.LARGE", manifest["merge"]["parameters"])
    found = verify(good["safetensors"], *inputs).as_json()
    assert [one["gate"]["size_class"] for one in found.values()] == ["from_1b"]
    scored: dict[str, Any] = {"calibration": TEXT.model_dump(), "evaluation": EVALUATION.model_dump()}
    result = export_to(tmp_path / "out", *inputs, quant="fp32", verify=True, **scored)
    assert [one.gate.size_class for folder in result.folders for one in folder.verdicts.values()] == ["from_1b"]
    monkeypatch.setattr("exporter.plan.gate_limits.LARGE", manifest["merge"]["parameters"] + 1)
    found = verify(good["safetensors"], *inputs).as_json()
    assert [one["gate"]["size_class"] for one in found.values()] == ["below_1b"]


# --- files alone ---------------------------------------------------------------------------------------------------


def compare_files(folder: Path, base: Path, *adapters: Path) -> FilesResult:
    return verify_files(folder, str(base), tuple(map(str, adapters)), Reporter())


@pytest.mark.parametrize("format_", ["gguf", "safetensors"])
def test_files_are_held_against_base_and_adapter_and_nothing_is_run(
    good: dict[str, Path], inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    def run(*_: object) -> None:
        raise AssertionError("loaded a runtime")

    monkeypatch.setattr("exporter.verify.published.verify.load_runtime", run)
    result = compare_files(good[format_], *inputs)
    assert result.passed
    manifest = json.loads((good[format_] / "export.json").read_text())
    stored = {f"{a['format']} {a['quant']}": a["weights"] for a in manifest["artifacts"]}
    assert {label: found["weights"] for label, found in result.as_json().items()} == stored


@pytest.mark.parametrize("format_", ["gguf", "safetensors"])
def test_files_of_another_model_fail_with_the_reasons_of_a_whole_verification(
    good: dict[str, Path], inputs: tuple[Path, Path], format_: str
) -> None:
    result = compare_files(good[format_], inputs[0])
    assert not result.passed
    whole = verify(good[format_], inputs[0], evaluation=EVALUATION.model_copy(update={"gate": {"*": 100.0}}))
    assert result.broken == {label: verdict.broken for label, verdict in whole.verdicts.items()}


def test_files_that_nothing_here_can_read_do_not_pass(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copy(good["gguf"], tmp_path / "out")
    manifest = json.loads((folder / "export.json").read_text())
    manifest["artifacts"][0]["format"] = "of-another-package"
    (folder / "export.json").write_text(json.dumps(manifest))
    result = compare_files(folder, *inputs)
    assert not result.passed
    assert result.broken == {"of-another-package F32": (UNREADABLE,), "gguf F16": ()}


# --- tampering -----------------------------------------------------------------------------------------------------


def flip(file: Path, position: int = -1) -> None:
    """Change one bit of a file."""
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def refused(folder: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> ArtifactError:
    """Verify, and check that the folder is refused before anything is scored."""

    def score(*_: object) -> None:
        raise AssertionError("scored a folder that is not what was published")

    monkeypatch.setattr("exporter.reference.predictions.score_reference", score)
    with pytest.raises(ArtifactError) as caught:
        verify(folder, *inputs)
    assert caught.value.exit_status == 2
    return caught.value


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        ("gguf", "model-F32.gguf"),
        ("gguf", "model-F16.gguf"),
        ("safetensors", "model.safetensors"),
        ("safetensors", "config.json"),
        ("safetensors", "tokenizer.json"),
        ("safetensors", "chat_template.jinja"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(
    good: dict[str, Path],
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format_: str,
    name: str,
) -> None:
    folder = copy(good[format_], tmp_path / "out")
    flip(folder / name, (folder / name).stat().st_size // 2)
    error = refused(folder, inputs, monkeypatch)
    assert error.thing == name
    assert "sha256" in error.found
    assert "sha256" in error.expected


def test_a_file_that_is_shorter_is_refused_by_its_size(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copy(good["gguf"], tmp_path / "out") / "model-F32.gguf"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 32)
    error = refused(file.parent, inputs, monkeypatch)
    assert (error.found, error.expected) == (f"{size - 32} bytes", f"{size} bytes")


def test_a_file_that_is_missing_is_refused(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(good["safetensors"], tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    assert refused(folder, inputs, monkeypatch).thing == "tokenizer.json"


def test_a_hash_of_the_manifest_that_was_changed_is_refused(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(good["gguf"], tmp_path / "out")
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"]["model-F16.gguf"]["sha256"] = "0" * 64
    (folder / "export.json").write_text(json.dumps(manifest))
    assert refused(folder, inputs, monkeypatch).thing == "model-F16.gguf"


MANIFEST: dict[str, Any] = {"name": "model", "merge": {"parameters": 1}, "artifacts": [], "files": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        json.dumps(MANIFEST | {"artifacts": [{}]}).encode(),
        json.dumps(MANIFEST | {"artifacts": "gguf"}).encode(),
        json.dumps(MANIFEST | {"artifacts": [{"format": "gguf", "quant": "F32", "bytes": 1}]}).encode(),
        json.dumps(MANIFEST | {"files": []}).encode(),
        json.dumps(MANIFEST | {"files": {"model-F32.gguf": {}}}).encode(),
        json.dumps(MANIFEST | {"files": {"model-F32.gguf": "abc"}}).encode(),
    ],
    ids=[
        "empty", "half", "not-text", "list", "nothing", "artifact", "artifacts", "entry", "files", "file", "hash",
    ],
)  # fmt: skip
def test_what_is_not_a_manifest_is_refused(
    good: dict[str, Path],
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
) -> None:
    folder = copy(good["gguf"], tmp_path / "out")
    (folder / "export.json").write_bytes(content)
    refused(folder, inputs, monkeypatch)


def test_a_folder_without_a_manifest_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "export.json" in refused(tmp_path, inputs, monkeypatch).thing
    assert "export.json" in refused(tmp_path / "nowhere", inputs, monkeypatch).thing


@pytest.mark.parametrize("listed", ["../outside.gguf", "/etc/hostname"])
def test_a_manifest_that_names_files_elsewhere_is_refused(
    good: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    """An entry outside of the folder would have another file scored than the one that was published."""
    folder = copy(good["gguf"], tmp_path / "out")
    shutil.move(folder / "model-F32.gguf", tmp_path / "outside.gguf")
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"][listed] = manifest["files"].pop("model-F32.gguf")
    manifest["artifacts"][0]["entry"] = listed
    (folder / "export.json").write_text(json.dumps(manifest))
    refused(folder, inputs, monkeypatch)
