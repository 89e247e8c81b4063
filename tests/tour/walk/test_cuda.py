"""The tour on CUDA against the tour on the CPU."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.backends.gguf.imatrix.file import read_imatrix
from exporter.inputs.row_blocks import RowBlock
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.cpu import CpuMerger
from exporter.merge.device import make_merger
from exporter.reference.predictions import score_reference
from exporter.tour.stream import Progress, Stream, Target
from tests.exports import export_to
from tests.folders import model_tensors
from tests.merged import merged_model, random_windows
from tests.tour.walk.test_walk import make_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FEW: dict[str, Any] = {"tokens": 1024, "window": 128}
WIDE: dict[str, Any] = {"hidden": 256, "intermediate": 512, "head_dim": 64}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "experts"])
def test_the_reference_is_the_cpu_s(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = make_experts(tmp_path / "base") if family == "experts" else make_base(family)
    adapters = [] if family == "experts" else [make_adapter(base)]
    windows = random_windows(4, 64, 384)
    cpu, cuda = (
        score_reference(merged_model(base, *adapters), windows, device).scores.log_probabilities
        for device in ("cpu", "cuda")
    )
    assert np.abs(cpu - cuda).max() < 1e-3


def test_second_moments_are_the_cpu_s(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2", tied=False, **WIDE)
    options = {"imatrix": "auto"}
    for device in ("cpu", "cuda"):
        export_to(
            tmp_path / device, base, device=device, format="gguf", quant="Q4_K_M", options=options, calibration=FEW,
            name="m",
        )  # fmt: skip
    one, other = (read_imatrix(tmp_path / device / "m.imatrix.gguf").entries for device in ("cpu", "cuda"))
    assert one.keys() == other.keys()
    for name, entry in one.items():
        np.testing.assert_allclose(other[name].in_sum2, entry.in_sum2, rtol=1e-2)


def test_gptq_loses_as_little(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3", **WIDE)
    losses = []
    for device in ("cpu", "cuda"):
        result = export_to(tmp_path / device, base, device=device, format="gptq", calibration=FEW)
        figures = result.folders[0].manifest["artifacts"][0]["quantization"]
        losses.append(np.array([figures["losses"][name] for name in sorted(figures["losses"])]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    cpu, cuda = (model_tensors(tmp_path / device) for device in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    assert all(cpu[name].shape == cuda[name].shape for name in cpu)


@contextmanager
def busy_default_stream() -> Iterator[None]:
    """Kernels of milliseconds, always several of them waiting on the default stream, as a layer's forward leaves it."""
    done = threading.Event()

    def feed() -> None:
        waiting: deque[torch.cuda.Event] = deque()
        while not done.is_set():
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
            waiting.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            waiting[-1].record()
            if len(waiting) > 4:
                waiting.popleft().synchronize()

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        done.set()
        feeder.join()


def test_a_layer_is_loaded_whole_while_another_computes(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    """The weights of the next layer come while this one's kernels are waiting: a copy that waits behind them finds the
    memory of its block taken by the thread's next one.

    Needs a device whose default stream can be kept busy, which is any; and tensors of several blocks, whose memory the
    allocator hands out again at once.
    """
    base = make_base("qwen2", tied=False, hidden=512, intermediate=6000, heads=8)
    model = merged_model(base, make_adapter(base))
    layers = [tensor for tensor in model.tensors if ".layers." in tensor.name and len(tensor.shape) == 2]
    with TensorReader() as reader:
        targets = {
            tensor.name: Target(torch.zeros(tensor.shape, device="cuda"), merged=number % 2 == 0)
            for number, tensor in enumerate(layers)
        }
        merger = make_merger("cuda", reader)
        stream = Stream(model, (), merger, threads=1, block_bytes=1 << 20, progress=Progress())
        try:
            with busy_default_stream():
                stream.offer(layers, (), targets)
                found = {name: target.values.cpu() for name, target in targets.items()}
        finally:
            stream.close()
        cpu = CpuMerger(reader)
        for tensor in layers:
            held = torch.empty(tensor.shape)
            merged = cpu.block(tensor, RowBlock(0, tensor.source.rows), cpu.factors(tensor), base=held)
            expected = merged if targets[tensor.name].merged else held
            assert torch.allclose(found[tensor.name], expected, rtol=1e-6, atol=1e-7), tensor.name
