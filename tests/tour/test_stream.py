"""Row blocks on their way from the merger to those who take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from exporter.artifact.staging import Staging
from exporter.backends.base import Writer
from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import Arrangement, stack, whole
from exporter.inputs.row_blocks import RowBlock
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.cpu import CpuMerger
from exporter.merge.merger import Factors
from exporter.merge.model import MergedModel, MergedTensor
from exporter.tour.riders import Rider
from exporter.tour.stream import Progress, Stream, Target
from tests.merged import load_peft, merged_model


class Leaving(CpuMerger):
    """Takes a block's memory back as soon as its thread leaves the device, as CUDA's allocator may."""

    def __init__(self, reader: TensorReader) -> None:
        super().__init__(reader)
        self._own = threading.local()

    def block(
        self,
        tensor: MergedTensor,
        block: RowBlock,
        factors: Factors,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert self._own.inside
        self._own.last = super().block(tensor, block, factors, base)
        last: torch.Tensor = self._own.last
        return last

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self._own.inside = True
        yield
        self._own.inside = False
        self._own.last.fill_(torch.nan)


class Keeping(Writer):
    """A writer that keeps its rows."""

    def __init__(self) -> None:
        self.rows: dict[str, torch.Tensor] = {}

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None:
        whole = self.rows.setdefault(tensor.sources[0], torch.full(tensor.shape, torch.nan).view(tensor.rows, -1))
        whole[first_row : first_row + block.shape[0]] = block

    def sync(self) -> None: ...

    def close(self) -> None: ...


def rider(model: MergedModel, staging: Staging, label: str = "rider") -> Rider:
    plans = [
        TensorPlan(tensor.name, whole(tensor.name), tensor.shape, "F32", "file", 0, 4 * tensor.shape[-1])
        for tensor in model.tensors
    ]
    return Rider.of(label, plans, Keeping(), staging)


def rows_of(one: Rider) -> dict[str, torch.Tensor]:
    assert isinstance(one.writer, Keeping)
    return one.writer.rows


def offer(model: MergedModel, riders: list[Rider], targets: dict[str, Target] | None = None) -> None:
    with TensorReader() as reader:
        stream = Stream(model, riders, Leaving(reader), threads=1, block_bytes=4096, progress=Progress())
        try:
            stream.offer(model.tensors, targets=targets)
            stream.finish()
        finally:
            stream.close()


@pytest.fixture
def sources(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    base = make_base("qwen2")
    return base, make_adapter(base)


def test_a_block_is_used_where_it_was_computed(sources: tuple[Path, Path], tmp_path: Path) -> None:
    model = merged_model(*sources)
    staging = Staging(tmp_path / "out", "key")
    one = rider(model, staging)
    targets = {tensor.name: Target(torch.zeros(tensor.shape), merged=True) for tensor in model.tensors}
    offer(model, [one], targets)
    staging.close()
    expected = load_peft(*sources).base_model.merge_and_unload().state_dict()
    for name, target in targets.items():
        assert (target.values - expected[name]).abs().max() < 1e-6
        assert (rows_of(one)[name].view(target.values.shape) - expected[name]).abs().max() < 1e-6


@pytest.mark.parametrize("first", [True, False])
def test_artifacts_of_one_label_are_told_apart(sources: tuple[Path, Path], tmp_path: Path, first: bool) -> None:
    """Of two folders with the same type, one has what an earlier run wrote."""
    model = merged_model(*sources)
    written, fresh = Staging(tmp_path / "written", "key"), Staging(tmp_path / "fresh", "key")
    written.record(("rider", tensor.name, None) for tensor in model.tensors)
    written.close()
    written = Staging(tmp_path / "written", "key")
    riders = [rider(model, written), rider(model, fresh)]
    offer(model, riders if first else riders[::-1])
    assert rows_of(riders[0]) == {}
    assert rows_of(riders[1]).keys() == {tensor.name for tensor in model.tensors}
    assert fresh.done("rider") == {tensor.name for tensor in model.tensors}
    written.close()
    fresh.close()


def test_a_stack_is_written_piece_by_piece_and_is_done_when_it_has_all(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two matrices as one stored tensor with its columns in another order, offered in two steps."""
    model = merged_model(*sources)
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    tensors = {tensor.name: tensor for tensor in model.tensors}
    rows, columns = tensors[names[0]].shape
    arrangement = Arrangement(tuple(reversed(range(columns))), "plus_one")
    plan = TensorPlan(
        names[0], stack(names, rows), (2, rows, columns), "F32", "file", 0, 4 * columns, arrangement=arrangement
    )
    staging = Staging(tmp_path / "out", "key")
    one = Rider.of("rider", [plan], Keeping(), staging)
    with TensorReader() as reader:
        stream = Stream(model, [one], Leaving(reader), threads=2, block_bytes=4096, progress=Progress())
        stream.offer([tensors[names[1]]])
        stream.finish()
        assert staging.done("rider") == set()
        stream.offer([tensors[names[0]]])
        stream.finish()
        assert staging.done("rider") == {plan.name}
        stream.close()
    staging.close()
    expected = load_peft(*sources).base_model.merge_and_unload().state_dict()
    wanted = torch.cat([expected[name] for name in names]).flip(1) + 1
    assert (rows_of(one)[names[0]] - wanted).abs().max() < 1e-6
