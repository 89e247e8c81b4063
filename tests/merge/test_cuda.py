"""The merge on CUDA against the merge on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.inputs.checkpoint import Checkpoint
from exporter.inputs.row_blocks import RowBlock, row_blocks
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.cpu import CpuMerger
from exporter.merge.device import make_merger, resolve_device
from exporter.merge.model import MergedModel, plan_merge
from tests.exports import export_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="session")
def model(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> MergedModel:
    from exporter.adapters.adapter import Adapter

    base = make_base("qwen2", tied=False, hidden=512, intermediate=3000, heads=8)
    adapter = make_adapter(base, target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head"], r=16)
    return plan_merge(Checkpoint.open(base), (Adapter.open(adapter),), "model")


def test_auto_takes_the_gpu() -> None:
    assert resolve_device("auto") == "cuda"


def test_the_merge_is_the_cpu_s_but_for_the_last_bits(model: MergedModel) -> None:
    with TensorReader() as reader:
        cpu, cuda = CpuMerger(reader), make_merger("cuda", reader)
        for tensor in model.tensors:
            whole = RowBlock(0, tensor.source.rows)
            expected = cpu.block(tensor, whole, cpu.factors(tensor))
            found = cuda.block(tensor, whole, cuda.factors(tensor)).cpu()
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), tensor.name
            if not tensor.updates:
                assert torch.equal(found, expected), tensor.name


@pytest.mark.parametrize("block_bytes", [4096, 1 << 22])
def test_same_bytes_for_any_block_size(model: MergedModel, block_bytes: int) -> None:
    with TensorReader() as reader:
        merger = make_merger("cuda", reader)
        for tensor in model.tensors:
            factors = merger.factors(tensor)
            whole = merger.block(tensor, RowBlock(0, tensor.source.rows), factors).cpu()
            parts = [
                merger.block(tensor, block, factors).cpu() for block in row_blocks(tensor.source, block_bytes, "cuda")
            ]
            assert torch.equal(torch.cat(parts), whole), tensor.name


@pytest.mark.parametrize(("output_format", "quant"), [("gguf", "Q4_0"), ("safetensors", "bf16")])
def test_export_runs_on_the_gpu_and_passes(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, output_format: str, quant: str
) -> None:
    base = make_base()
    result = export_to(
        tmp_path / "out", base, make_adapter(base), format=output_format, quant=quant, device="cuda",
        verify=True, evaluation={"tokens": 512, "n_ctx": 128, "gate": {"*": 0.05}},
    )  # fmt: skip
    assert result.passed
    assert result.folders[0].manifest["merge"]["device"] == "cuda"
