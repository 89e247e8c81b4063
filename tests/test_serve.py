"""The whole flow with vLLM as the judge, as a user with its environment would see it."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.runtimes.vllm import missing_kernel
from tests.exports import export_to
from tests.vllm_server import needs_vllm

EVALUATION = {"tokens": 2048, "n_ctx": 256}


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
@pytest.mark.parametrize(("bits", "largest"), [(4, 0.05), (8, 0.01)])
def test_gptq_is_scored_by_vllm(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, largest: float
) -> None:
    if lacking := missing_kernel(bits):
        pytest.skip(lacking)
    result = export_to(
        tmp_path / "out", demo / "base", demo / "adapter", format="gptq", quant=f"gptq-int{bits}-g128", verify=True,
        evaluation=EVALUATION | {"gate": {"*": 1.0}},
    )  # fmt: skip
    verdict = result.folders[0].verdicts[f"gptq gptq-int{bits}-g128"]
    assert verdict.runtime.startswith("vllm")
    assert verdict.comparison is not None
    assert abs(verdict.comparison.delta) < largest
