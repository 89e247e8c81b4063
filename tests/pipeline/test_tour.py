"""The tour refuses a writer that cannot do what its plan needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.artifact.staging import Staging
from exporter.backends.base import Backend, Writer
from exporter.backends.output_plan import Needs, OutputPlan, TensorPlan
from exporter.backends.pieces import whole
from exporter.errors import BackendError
from exporter.merge.model import MergedModel
from exporter.pipeline.job import Job
from exporter.pipeline.tour import _Boarded
from exporter.plan.export_plan import FolderPlan


class Plain(Writer):
    """A writer that has only what it must."""

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class PlainBackend(Backend):
    """A backend of such writers."""

    name, summary, quants, needs, packages = "plain", "", ("f32",), "hessians", ()

    def default_quant(self, model: MergedModel) -> str:
        raise AssertionError

    def plan(self, model: MergedModel, quant: str, options: Mapping[str, Any], *, verified: bool = False) -> OutputPlan:
        raise AssertionError

    def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
        return Plain()


@pytest.mark.parametrize(("needs", "verb"), [("moments", "observe"), ("hessians", "solve")])
def test_a_writer_without_the_method_that_its_plan_needs_is_refused(needs: Needs, verb: str, tmp_path: Path) -> None:
    tensor = TensorPlan("weight", whole("weight"), (2, 4), "F32", "file", 0, 16)
    plan = OutputPlan("plain", "f32", ".", (), (tensor,), needs=needs, calibrated=frozenset({"weight"}))
    job = Job(FolderPlan(tmp_path / "out", PlainBackend(), (plan,), {}), Staging(tmp_path / "out", "key"))
    with pytest.raises(BackendError, match=rf"plain f32: found a writer that cannot {verb}; .* needs {needs}"):
        _Boarded.board(0, job, plan)


def test_a_writer_does_nothing_in_what_it_does_not_override(tmp_path: Path) -> None:
    writer = Plain()
    writer.place("cpu", 2)
    assert writer.finish(None).names == ()
    assert writer.digests() == {}
    assert writer.checksum("weight") is None
