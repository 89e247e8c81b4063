"""GPTQ from base and adapter to the verdict, by our solver and by GPTQModel, scored in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import Execution, export
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.recipe import Calibration, Evaluation
from exporter.runtimes.transformers.runtime import Transformers
from exporter.tokens.windows import make_windows
from tests.exports import recipe
from tests.folders import hashes
from tests.gptq import needs_gptqmodel, unpack_script

pytestmark = [pytest.mark.slow, needs_gptqmodel]

FEW: dict[str, Any] = {
    "calibration": {"tokens": 4096, "window": 256},
    "evaluation": {"tokens": 512, "n_ctx": 256, "gate": {"*": 1.0}},
}


def export_demo(demo: Path, out: Path, format_: str, quant: str) -> Any:
    wanted = recipe(
        demo / "base", [demo / "adapter"], out, format=format_, quant=quant, name="demo", verify=True, **FEW
    )
    return export(wanted, Execution(device="cpu", runtime="transformers"))


@pytest.mark.parametrize(("bits", "largest"), [(4, 0.05), (8, 0.005)])
def test_ours_scores_as_its_unpacked_weights_do(demo: Path, tmp_path: Path, bits: int, largest: float) -> None:
    result = export_demo(demo, tmp_path / "out", "gptq", f"gptq-int{bits}-g128")
    assert result.passed
    figures = result.folders[0].verdicts[f"gptq gptq-int{bits}-g128"].comparison
    assert abs(figures.delta) < largest
    assert 0 < figures.divergence.mean < largest
    unpack_script().unpack_folder(tmp_path / "out", tmp_path / "unpacked")
    windows = make_windows(
        Calibration(), Evaluation(tokens=512, n_ctx=256), TokenizerFiles.choose(tmp_path / "unpacked", ())
    )
    scores = Transformers().score(tmp_path / "unpacked", windows, lambda _: None)
    assert figures.perplexity == pytest.approx(np.exp(-scores.log_probabilities.mean()), rel=0.005)


def test_gptqmodel_makes_the_same_kind_of_folder(demo: Path, tmp_path: Path) -> None:
    result = export_demo(demo, tmp_path / "out", "gptqmodel", "gptq-int4-g128")
    assert result.passed
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    listed = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    made = {"export.json", "README.md", "report.html"}
    assert {name: digest for name, digest in hashes(tmp_path / "out").items() if name not in made} == listed
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= listed.keys()
    assert manifest["calibration"]["tokens"] == 4096
    assert abs(result.folders[0].verdicts["gptqmodel gptq-int4-g128"].comparison.delta) < 0.05
