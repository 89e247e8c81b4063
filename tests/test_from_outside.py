"""A format, a runtime and an adapter method of other packages, in one export: none of the three is known here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.test_registry import IA3
from tests.backends.test_registry import install
from tests.commands import run
from tests.ia3 import make_ia3
from tests.runtimes.test_from_outside import ECHO

# A format of a dozen lines: folders of safetensors that the runtime from outside serves, with a card of its own.
FOLDER = """
from dataclasses import replace
from exporter.backends.safetensors.backend import SafetensorsBackend
from exporter.backends.type_limits import TypeLimits

class Folder(SafetensorsBackend):
    name, summary, quants = "folder", "a model folder for echo-serve", ("fp32",)
    limits = {"fp32": TypeLimits(0.001, 0.99, 0.0005)}

    def plan(self, model, quant, options, *, verified=False):
        return replace(super().plan(model, quant, options), format="folder", runtimes=("echo",))

    def tags(self, quant):
        return ("echo-serve",)
"""


@pytest.mark.slow
def test_all_three_export_together(make_base: Callable[..., Path], tmp_path: Path) -> None:
    # Without biases, which (IA)^3 scales too and this short method does not.
    base = make_base("qwen3", tied=False)
    expected = make_ia3(base, tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("".join(f"Line {number} of a text to score.\n" for number in range(400)))
    sites = [
        install(tmp_path / "format", "folder", FOLDER, "folder_backend:Folder", "theirs"),
        install(tmp_path / "runtime", "echo", ECHO, "echo_runtime:Echo", "others", kind="runtime"),
        install(tmp_path / "method", "ia3", IA3, "ia3_adapter:Ia3", "third", kind="adapter"),
    ]
    result = run(
        "export", "--base", base, "--adapter", tmp_path / "adapter", "--format", "folder", "--out", tmp_path / "out",
        "--quant", "fp32", "--name", "tuned", "--calibration", tmp_path / "text.txt", "--eval-tokens", "512",
        "--eval-window", "128", "--no-answers", "--json", env={"PYTHONPATH": ":".join(map(str, sites))},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    artifact = manifest["artifacts"][0]
    assert (artifact["format"], artifact["runtimes"][0]) == ("folder", "echo")
    assert artifact["verification"]["runtime"] == "echo 1.0"
    assert artifact["verification"]["verdict"] == "passed"
    assert artifact["verification"]["gate"]["max_divergence"] == 0.0005
    assert manifest["inputs"][1]["adapter"]["method"] == "ia3"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "echo-serve --name tuned" in card
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
