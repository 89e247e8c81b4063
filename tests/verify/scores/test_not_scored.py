"""Artifacts that their runtimes cannot load or run: a verdict with a reason, and never the end of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from exporter.compare.compare import compare_folders
from exporter.errors import ExporterError, RuntimeScoreError, RuntimeUnavailableError
from exporter.plan.gate_limits import Gate
from exporter.plan.reporter import Reporter
from exporter.reference.further_tokens import PackTokens
from exporter.runtimes.base import Runtime, TokenScores
from exporter.runtimes.transformers import session as transformers_session
from exporter.runtimes.transformers.runtime import Transformers
from exporter.verify.candidates import Candidate, judge_candidates
from exporter.verify.scores.not_scored import unscored_reason
from tests.commands import invoke
from tests.exports import export_to
from tests.folders import copy, listing, rehash
from tests.predictions import reference_of
from tests.publish.report.page import Page

ROOT = Path(__file__).resolve().parents[3]
EVALUATION: dict[str, Any] = {"tokens": 128, "n_ctx": 64}


@pytest.fixture(scope="module")
def inputs(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    base = make_base("qwen3")
    return base, make_adapter(base)


@pytest.fixture(scope="module")
def exported(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound folders, not verified yet."""
    parent = tmp_path_factory.mktemp("sound")
    recipe: dict[str, Any] = {"name": "model", "calibration": {"text": Path(__file__)}, "evaluation": EVALUATION}
    export_to(parent / "gguf", *inputs, format="gguf", quant=("F32", "F16"), **recipe)
    export_to(parent / "folder", *inputs, quant=("bf16",), **recipe)
    return {"gguf": parent / "gguf", "folder": parent / "folder"}


# --- verifying again -----------------------------------------------------------------------------------------------


def damage(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file, and the manifest with it: what is simulated is a faulty exporter, and not a disk."""
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    rehash(folder / "export.json", name)


def verify(folder: Path, inputs: tuple[Path, Path], *options: str | Path) -> Any:
    given = ("--base", inputs[0], "--adapter", inputs[1], "--calibration", __file__, "--json")
    return invoke("verify", folder, *given, *options)


def test_a_truncated_gguf_has_failed_and_the_other_is_scored(
    exported: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, report = copy(exported["gguf"], tmp_path / "out"), tmp_path / "now.html"
    damage(folder, "model-F32.gguf", lambda raw: raw[:-1000])
    result = verify(folder, inputs, "--report", report)
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    cut, sound = found["gguf F32"], found["gguf F16"]
    assert (cut["verdict"], sound["verdict"]) == ("failed", "passed")
    assert any("is cut off" in reason for reason in cut["weights"]["broken"])
    assert cut["not_scored"].startswith("not scored in llamacpp: found llama.cpp could not load it: ")
    assert "not within the file bounds" in cut["not_scored"]
    assert cut["broken"] == [*cut["weights"]["broken"], cut["not_scored"]]
    assert cut["answers"] is None
    assert "perplexity" not in cut
    assert sound["perplexity"] > 1
    assert sound["answers"]["broken"] == []
    page = Page.of(report.read_bytes())
    assert page.texts("span", "reason") == [" ".join(reason.split()) for reason in cut["broken"]]
    assert page.texts("span", "area")[-1] == "scores"
    (sentence, *_) = page.texts("p", "sentence")
    assert sentence == "gguf F32 could not be scored by what serves it: do not serve it."
    assert "not scored" in result.stderr
    assert "is cut off" in result.stderr


@pytest.mark.parametrize(
    "change",
    [lambda raw: raw[:-1000], lambda raw: raw[:100], lambda raw: b"", lambda raw: b"\xff" * 64 + raw],
    ids=["data", "header", "empty", "noise"],
)
def test_a_folder_whose_weights_cannot_be_read_has_failed(
    exported: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    folder, report = copy(exported["folder"], tmp_path / "out"), tmp_path / "now.html"
    damage(folder, "model.safetensors", change)
    result = verify(folder, inputs, "--runtime", "transformers", "--report", report)
    assert result.exit_code == 3
    found = json.loads(result.stdout)["safetensors bf16"]
    assert found["weights"]["broken"]
    assert found["not_scored"].startswith("not scored in transformers: found ")
    assert found["runtime"].startswith("transformers ")
    assert found["broken"] == [*found["weights"]["broken"], found["not_scored"]]
    assert str(tmp_path) not in result.stdout
    assert "could not be scored" in report.read_text()


def test_a_pack_fails_it_too(exported: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder, report = copy(exported["gguf"], tmp_path / "out"), tmp_path / "now.html"
    damage(folder, "model-F16.gguf", lambda raw: raw[:-1000])
    given = ("--base", inputs[0], "--adapter", inputs[1], "--calibration", __file__)
    made = invoke("reference", *given, "--eval-tokens", "128", "--eval-window", "64", "--out", tmp_path / "pack")
    assert made.exit_code == 0
    result = invoke("verify", folder, "--reference", tmp_path / "pack", "--json", "--report", report)
    assert result.exit_code == 3
    assert {label: one["verdict"] for label, one in json.loads(result.stdout).items()} == {
        "gguf F32": "passed", "gguf F16": "failed",
    }  # fmt: skip
    assert "not within the file bounds" in report.read_text()


def test_what_is_no_fault_of_the_artifact_s_is_an_error_of_the_run(
    exported: dict[str, Path], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A server that is not there, and a runtime that the folder is not made for."""
    report = tmp_path / "now.html"
    result = verify(exported["folder"], inputs, "--endpoint", "http://127.0.0.1:9", "--report", report)
    assert result.exit_code == 1
    assert "Connection refused" in " ".join(result.stderr.split())
    result = verify(exported["folder"], inputs, "--runtime", "llamacpp", "--report", report)
    assert result.exit_code == 1
    assert "llama.cpp could not load it" in " ".join(result.stderr.split())
    assert not report.exists()


# --- exporting -----------------------------------------------------------------------------------------------------


def recipe_file(inputs: tuple[Path, Path], parent: Path, *, answers: bool = True) -> Path:
    """Two outputs, one of which llama.cpp scores and the other transformers."""
    outputs = [
        {"format": "safetensors", "quant": ["bf16"], "out": str(parent / "folder")},
        {"format": "gguf", "quant": ["F16"], "out": str(parent / "gguf")},
    ]
    values = {
        "base": str(inputs[0]), "adapters": [str(inputs[1])], "name": "model", "outputs": outputs,
        "calibration": {"text": __file__}, "evaluation": EVALUATION | {"answers": answers},
    }  # fmt: skip
    file = parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORTER_SERVE_ENV", "")


def failing(kind: type[RuntimeScoreError]) -> Callable[..., Any]:
    def score(self: Transformers, artifact: Path, *_: Any) -> Any:
        raise kind(
            artifact.name, found=f"nothing to load in {artifact}/model.safetensors", expected="weights", remedy="None."
        )

    return score


def test_one_output_that_cannot_be_loaded_does_not_keep_the_other(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("asked what could not be scored")

    monkeypatch.setattr(Transformers, "score", failing(RuntimeScoreError))
    monkeypatch.setattr(Transformers, "session", ask)
    result = invoke("export", recipe_file(inputs, tmp_path), "--json", "--device", "cpu")
    assert result.exit_code == 3
    assert {path for path in listing(tmp_path) if "/" not in path} == {"recipe.yaml", "folder.rejected", "gguf"}
    rejected, published = (
        json.loads((tmp_path / name / "export.json").read_text()) for name in ("folder.rejected", "gguf")
    )
    assert json.loads(result.stdout) == [rejected, published]
    schema = json.loads((ROOT / "docs" / "export.schema.json").read_text())
    for manifest in (rejected, published):
        jsonschema.Draft202012Validator(schema).validate(manifest)
        assert str(tmp_path) not in json.dumps(manifest)
    (artifact,) = rejected["artifacts"]
    reason = "not scored in transformers: found nothing to load in files/model.safetensors; expected weights"
    assert artifact["verification"]["verdict"] == "failed"
    assert artifact["verification"]["not_scored"] == reason
    assert artifact["verification"]["broken"] == [reason]
    assert artifact["weights"]["broken"] == []
    assert published["artifacts"][0]["verification"]["verdict"] == "passed"
    page = Page.of((tmp_path / "folder.rejected" / "report.html").read_bytes())
    assert page.texts("span", "reason") == [reason]
    assert page.texts("p", "sentence") == [
        "safetensors bf16 could not be scored by what serves it: nothing was published."
    ]
    assert page.texts("p", "diagnosis") == ["What serves it cannot load it, or gives no numbers."]
    card = (tmp_path / "folder.rejected" / "README.md").read_text()
    assert f"**bf16, failed:** {reason}." in card
    assert "not scored, for it could not be loaded or run." in card
    compared = compare_folders([tmp_path / "folder.rejected", tmp_path / "gguf"])
    assert compared.warnings == (f"folder.rejected bf16: {reason}",)
    assert "safetensors bf16: not scored in transformers: found nothing" in result.stderr


def test_a_runtime_that_is_not_there_leaves_everything_staged(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(inputs, tmp_path, answers=False)
    with monkeypatch.context() as patched:
        patched.setattr(Transformers, "score", failing(RuntimeUnavailableError))
        result = invoke("export", file, "--json", "--device", "cpu")
    assert result.exit_code == 1
    top = {path for path in listing(tmp_path) if "/" not in path}
    assert top == {"recipe.yaml", ".folder.staging", ".gguf.staging"}
    # And the same command goes on from there.
    assert invoke("export", file, "--json", "--device", "cpu").exit_code == 0


def test_what_scores_and_does_not_answer_has_failed(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: object) -> None:
        raise RuntimeScoreError("model", found="nothing", expected="a token", remedy="None.")

    monkeypatch.setattr(transformers_session.TransformersSession, "generate", generate)
    result = invoke("export", recipe_file(inputs, tmp_path), "--json", "--device", "cpu")
    assert result.exit_code == 3
    rejected, published = json.loads(result.stdout)
    (artifact,) = rejected["artifacts"]
    reason = "no answers in transformers: found nothing; expected a token"
    assert artifact["answers"] is None
    assert artifact["verification"]["broken"] == [artifact["verification"]["not_answered"]] == [reason]
    assert published["artifacts"][0]["answers"]["broken"] == []
    page = Page.of((tmp_path / "folder.rejected" / "report.html").read_bytes())
    assert (page.texts("span", "area"), page.texts("span", "reason")) == (["answers"], [reason])
    jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "export.schema.json").read_text())).validate(rejected)


# --- judging -------------------------------------------------------------------------------------------------------


LOGITS = np.random.default_rng(0).standard_normal((2, 9, 24)).astype(np.float32)
REFERENCE = reference_of(LOGITS)


class Scoring(Runtime):
    """A runtime whose scores are the reference's, less so much; or which raises an error."""

    name = "scoring"

    def __init__(self, less: float = 0.0, error: ExporterError | None = None) -> None:
        self._less, self._error = less, error

    def version(self) -> str:
        return "scoring 1"

    def score(self, *_: object) -> TokenScores:
        if self._error is not None:
            raise self._error
        return TokenScores(REFERENCE.scores.log_probabilities - self._less, REFERENCE.scores.top_tokens)


def judged(*runtimes: Scoring, served: bool = True) -> list[Any]:
    candidates = [Candidate("made", "made", Path("model"), one, Gate(0.5, 0.5), None, served) for one in runtimes]
    return judge_candidates(
        candidates, [None] * len(candidates), REFERENCE, PackTokens(REFERENCE, len(REFERENCE.windows.ids)), Reporter()
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_have_failed(value: float) -> None:
    spoilt, sound = judged(Scoring(value), Scoring())
    assert (spoilt.verdict, sound.verdict) == ("failed", "passed")
    assert spoilt.comparison is None
    assert spoilt.broken == ("not scored in scoring: found log-probabilities that are not finite; expected numbers",)
    assert not spoilt.passed


def out_of_memory() -> RuntimeScoreError:
    """As runtimes raise it: in words of their own, for another error."""
    try:
        try:
            raise MemoryError("no more")
        except MemoryError as error:
            raise RuntimeScoreError("model", found=str(error), expected="scores", remedy="None.") from None
    except RuntimeScoreError as error:
        return error


@pytest.mark.parametrize(
    ("error", "served"),
    [
        (RuntimeUnavailableError("vllm", found="nothing", expected="an environment", remedy="None."), True),
        (out_of_memory(), True),
        (RuntimeScoreError("model", found="nothing", expected="a model", remedy="None."), False),
    ],
    ids=["unavailable", "memory", "not-made-for-it"],
)
def test_the_run_s_own_faults_are_no_verdict(error: RuntimeScoreError, served: bool) -> None:
    with pytest.raises(RuntimeScoreError) as caught:
        judged(Scoring(), Scoring(error=error), served=served)
    assert caught.value is error


def test_an_interruption_is_no_verdict() -> None:
    class Interrupted(Scoring):
        def score(self, *_: object) -> TokenScores:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(Interrupted())


def test_a_reason_holds_neither_paths_nor_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for entry in (tmp_path / "out" / "a.gguf", Path("out/a.gguf")):
        error = RuntimeScoreError(
            "a.gguf at http://host:8000", found=f"no {tmp_path / 'out' / 'a.gguf'}\n nor b", expected="one", remedy="."
        )
        assert unscored_reason(error, "not scored", "llamacpp", entry) == (
            "not scored in llamacpp: found no a.gguf nor b; expected one"
        )
