"""The whole flow on the demo and on small models, through the public API and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporter import Evaluation, Execution, Output, Recipe, export
from exporter.cli.app import app

MakeFolder = Callable[..., Path]


def test_demo_gguf_scores_like_the_reference_and_is_published(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = Recipe(
        base=str(demo / "base"),
        adapters=(str(demo / "adapter"),),
        outputs=(Output(format="gguf", quant=("F32", "Q8_0"), out=out),),
        name="demo",
        evaluation=Evaluation(tokens=2048),
    )
    result = export(recipe)
    assert result.passed
    exact, eighth = (result.folders[0].verdicts[label].comparison for label in ("gguf F32", "gguf Q8_0"))
    assert exact is not None
    assert eighth is not None
    assert abs(exact.delta) < 1e-4
    # Not all: near ties fall the other way in another order of summation.
    assert exact.same_top > 0.995
    assert abs(eighth.delta) < 0.01
    assert {file.name for file in out.iterdir()} == {
        "demo-F32.gguf", "demo-Q8_0.gguf", "Modelfile.F32", "Modelfile.Q8_0", "README.md", "export.json", "report.html",
    }  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_safetensors_loads_in_transformers_and_scores_like_the_reference(demo: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        base=str(demo / "base"),
        adapters=(str(demo / "adapter"),),
        outputs=(Output(format="safetensors", out=tmp_path / "out"),),
        evaluation=Evaluation(tokens=1024),
    )
    result = export(recipe)
    assert result.passed
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    figures = manifest["artifacts"][0]["verification"]
    assert figures["verdict"] == "passed"
    assert abs(figures["delta"]) < 0.01


def test_the_bytes_do_not_depend_on_threads_or_block_size(
    make_base: MakeFolder, make_adapter: MakeFolder, tmp_path: Path
) -> None:
    base = make_base("qwen2", tied=False, hidden=96, intermediate=352)
    adapter = make_adapter(base)
    contents = []
    for index, execution in enumerate((Execution(threads=1, block_bytes=4096), Execution(threads=3))):
        out = tmp_path / str(index)
        outputs = (Output(format="gguf", quant=("Q4_K_M", "BF16"), out=out),)
        recipe = Recipe(base=str(base), adapters=(str(adapter),), outputs=outputs, verify=False)
        export(recipe, execution)
        contents.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert contents[0] == contents[1]


def test_a_failed_gate_leaves_nothing_at_the_output(
    make_base: MakeFolder, make_adapter: MakeFolder, tmp_path: Path
) -> None:
    base = make_base()
    arguments = ["export", "--base", str(base), "--adapter", str(make_adapter(base)), "--format", "gguf"]
    arguments += ["--quant", "Q4_0", "--out", str(tmp_path / "out"), "--eval-window", "128", "--eval-tokens", "256"]
    outcome = CliRunner().invoke(app, [*arguments, "--gate", "0"])
    assert outcome.exit_code == 3
    assert not (tmp_path / "out").exists()
    manifest = json.loads((tmp_path / "out.rejected" / "export.json").read_text())
    assert manifest["artifacts"][0]["verification"]["verdict"] == "failed"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--base": "/nowhere"}, "no such folder"),
        ({"--format": "onnx"}, "gguf, gptq, gptqmodel, safetensors"),
        ({"--quant": "Q9"}, "Q4_K_M"),
        ({"--device": "tpu"}, "cuda:N"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    changes: dict[str, str], named: str, make_base: MakeFolder, tmp_path: Path
) -> None:
    options = {"--base": str(make_base()), "--format": "gguf", "--quant": "Q8_0", "--out": str(tmp_path / "out")}
    arguments = [part for pair in (options | changes).items() for part in pair]
    outcome = CliRunner().invoke(app, ["export", *arguments, "--no-verify"])
    assert outcome.exit_code == 2
    assert named in " ".join(outcome.output.split())
    assert list(tmp_path.iterdir()) == []
