"""The tour refuses a writer that cannot do what its plan needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporter.artifact.staging import Staging
from exporter.backends.base import Writer
from exporter.backends.output_plan import Needs, OutputPlan, TensorPlan
from exporter.backends.pieces import whole
from exporter.errors import BackendError
from exporter.pipeline.tour import _Boarded


class Plain(Writer):
    """A writer that has only what it must."""

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(("needs", "verb"), [("moments", "observe"), ("hessians", "solve")])
def test_a_writer_without_the_method_that_its_plan_needs_is_refused(needs: Needs, verb: str, tmp_path: Path) -> None:
    tensor = TensorPlan("weight", whole("weight"), (2, 4), "F32", "file", 0, 16)
    plan = OutputPlan("plain", "f32", ".", (), (tensor,), needs=needs, calibrated=frozenset({"weight"}))
    with pytest.raises(BackendError, match=rf"plain f32: found a writer that cannot {verb}; .* needs {needs}"):
        _Boarded.board(0, plan, Plain(), Staging(tmp_path / "out", "key"))


def test_a_writer_does_nothing_in_what_it_does_not_override(tmp_path: Path) -> None:
    writer = Plain()
    writer.place("cpu", 2)
    assert writer.finish(None).names == ()
    assert writer.digests() == {}
    assert writer.checksum("weight") is None
