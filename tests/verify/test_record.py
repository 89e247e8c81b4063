"""What verification goes by of a published folder: the runtime that scores an artifact is the one of its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import RecipeError
from exporter.plan import make_plan
from exporter.recipe import Calibration, Evaluation, Execution
from exporter.reporter import Reporter
from exporter.runtimes import gptqmodel, vllm
from exporter.runtimes.base import choose_runtime
from exporter.speed import measure_folders
from exporter.verify.published import verify_published
from exporter.verify.record import PublishedArtifact
from tests.exports import recipe
from tests.vllm_server import make_environment

ARTIFACT = PublishedArtifact(format="gptq", quant="x", entry=".", runtimes=["vllm", "transformers"], bytes=1)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM is here and multiplies with 4 bits alone; transformers loads GPTQ."""
    monkeypatch.setenv(vllm.ENVIRONMENT, str(make_environment(tmp_path / "serve")))
    monkeypatch.setattr(vllm, "missing_kernel", lambda bits: None if bits == 4 else f"no kernel for {bits} bits")
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ())


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


@pytest.mark.parametrize("options", [{}, {"overrides": {".*down_proj": {"bits": 8}}}])
def test_what_an_export_writes_is_scored_by_what_it_planned(
    make_base: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base = make_base("qwen2")
    plan = make_plan(
        recipe(base, (), tmp_path / "out", format="gptq", quant="gptq-int4-g32", options=options), Execution()
    )
    (artifact,) = plan.artifacts
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "config.json").write_bytes(artifact.documents["config.json"])
    planned = choose_runtime(["vllm", "transformers"], endpoint=None, packed_bits=artifact.packed_bits)
    assert planned == ("transformers" if options else "vllm")
    assert ARTIFACT.runtime(folder) == planned


def test_verifying_and_measuring_take_the_runtime_of_the_bits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", {"bits": 8})
    artifact = ARTIFACT.model_copy(update={"runtimes": ["vllm"]}).model_dump()
    (folder / "export.json").write_text(json.dumps({"name": "model", "artifacts": [artifact], "files": {}}))
    with pytest.raises(RecipeError, match="no kernel for 8 bits"):
        measure_folders([folder], "cpu", Reporter())
    with pytest.raises(RecipeError, match="no kernel for 8 bits"):
        verify_published(folder, "base", (), Calibration(), Evaluation(), None, "cpu", Reporter())
