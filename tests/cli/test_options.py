"""Options of the command line that change what is computed: each gets to where it counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backends.gguf.imatrix.file import imatrix_bytes
from tests.commands import invoke, run
from tests.folders import hashes
from tests.importances import random_importances

Make = Callable[..., Path]
WIDE: dict[str, Any] = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 2}


@pytest.fixture(scope="session")
def base(make_base: Make) -> Path:
    return make_base("qwen2", **WIDE)


def exported(base: Path, out: Path, *options: str | Path) -> dict[str, Any]:
    """The manifest of an export that is not verified."""
    result = invoke("export", "--base", base, "--out", out, "--name", "model", "--no-verify", "--json", *options)
    assert result.exit_code == 0, result.stderr
    manifest: dict[str, Any] = json.loads(result.stdout)
    return manifest


def test_the_walk_computes_in_what_was_asked_for(base: Path, tmp_path: Path) -> None:
    figures = {}
    for dtype in ("float32", "bfloat16"):
        scored = ("--eval-tokens", "128", "--eval-window", "64", "--compute-dtype", dtype)
        result = invoke("reference", "--base", base, "--out", tmp_path / dtype, *scored, "--device", "cpu", "--json")
        assert result.exit_code == 0, result.stderr
        figures[dtype] = json.loads(result.stdout)["perplexity"]
    assert figures["bfloat16"] != figures["float32"]
    assert figures["bfloat16"] == pytest.approx(figures["float32"], rel=0.02)


def test_the_solver_is_fed_by_what_was_asked_for(base: Path, tmp_path: Path) -> None:
    few = ("--format", "gptq", "--calibration-tokens", "512", "--window", "64")
    digests = []
    for dtype in ("float32", "bfloat16"):
        manifest = exported(base, tmp_path / dtype, *few, "--compute-dtype", dtype)
        assert manifest["recipe"]["compute_dtype"] == dtype
        digests.append(manifest["files"]["model.safetensors"]["sha256"])
    assert digests[0] != digests[1]


def test_an_importance_matrix_from_a_file(base: Path, tmp_path: Path) -> None:
    (tmp_path / "given.gguf").write_bytes(imatrix_bytes(random_importances(), ("text.txt",), 4, 512))
    common = ("--format", "gguf", "--quant", "Q4_K_M", "--imatrix")
    without = exported(base, tmp_path / "without", *common, "none")
    given = exported(base, tmp_path / "given", *common, tmp_path / "given.gguf")
    assert "model.imatrix.gguf" in given["files"]
    assert "model.imatrix.gguf" not in without["files"]
    weights = "model-Q4_K_M.gguf"
    assert given["files"][weights]["sha256"] != without["files"][weights]["sha256"]


def test_what_no_server_takes_is_written_on_request_alone(base: Path, tmp_path: Path) -> None:
    few = ("--calibration-tokens", "512", "--window", "64")
    wanted = ("plan", "--base", base, "--out", tmp_path / "out", "--no-verify", "--format", "gptq", *few)
    refused = invoke(*wanted, "--quant", "gptq-int3-g128")
    assert refused.exit_code == 2
    assert "--force-unservable" in refused.stderr
    assert invoke(*wanted, "--quant", "gptq-int3-g128", "--force-unservable").exit_code == 0


KILLED = """
import os, signal, sys
from exporter.backends.gptq.writer import GptqWriter
from exporter.cli.app import app
store, left = GptqWriter._store, [10]
def dying(self, *arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    store(self, *arguments)
GptqWriter._store = dying
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_within_a_layer_goes_on_with_the_same_bytes(base: Path, tmp_path: Path) -> None:
    few = ("--format", "gptq", "--calibration-tokens", "512", "--window", "64", "--name", "model", "--no-verify")
    arguments = ("export", "--base", base, "--device", "cpu", *few, "--out")
    assert run(*arguments, tmp_path / "out", program=KILLED).returncode == -9
    assert not (tmp_path / "out").exists()
    assert invoke(*arguments, tmp_path / "out").exit_code == 0
    assert invoke(*arguments, tmp_path / "whole").exit_code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
