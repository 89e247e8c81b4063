"""Runs of several outputs that were stopped on the way, in this process, and went on.

Journals and progress are ours alone, so a run that was not stopped is the witness of one that was. In tests/backends
other programs read the files that a run leaves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import Recipe, export
from exporter.errors import BackendError
from exporter.merge.model import MergedTensor
from exporter.plan.reporter import Reporter
from exporter.tour.stream import Stream
from exporter.tour.walk.walk import Walk
from tests.exports import export_to
from tests.folders import hashes
from tests.gptq import needs_gptqmodel

Make = Callable[..., Path]
FEW: dict[str, Any] = {
    "calibration": {"text": Path(__file__), "tokens": 512, "window": 64},
    "evaluation": {"tokens": 128, "n_ctx": 64, "answers": False, "gate": {"*": 5.0}},
}


class Stopping(Reporter):
    """Stops the run once so many layers are done, or after the tour if it has no layers."""

    def __init__(self, after: int) -> None:
        self.after, self.layers = after, [0]

    def layer(self, done: int, layers: int) -> None:
        self.layers.append(done)
        if done == self.after:
            raise KeyboardInterrupt

    def toured(self) -> None:
        if not self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def sources(make_base: Make, make_adapter: Make) -> dict[str, Any]:
    base = make_base("qwen2", layers=3)
    return {"base": str(base), "adapters": [str(make_adapter(base))], "name": "m"}


def test_a_lost_staging_folder_is_written_anew(sources: dict[str, Any], tmp_path: Path) -> None:
    """Beside another output of the same type, which has everything."""

    def run(parent: Path, **reporter: Any) -> None:
        outputs: list[dict[str, Any]] = [{"format": "safetensors", "out": parent / name} for name in ("one", "two")]
        outputs[1]["options"] = {"max_shard_size": "100KB"}
        export(Recipe.build(sources | {"outputs": outputs, "verify": False}), **reporter)

    run(tmp_path / "whole")
    for lost in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / lost, reporter=Stopping(0))
        shutil.rmtree(tmp_path / lost / f".{lost}.staging")
        run(tmp_path / lost)
        assert hashes(tmp_path / lost) == hashes(tmp_path / "whole")


def test_a_tensor_that_never_came_is_not_published(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = Stream.offer

    def without_the_norm(self: Stream, tensors: Iterable[MergedTensor], *rest: Any) -> None:
        offer(self, [tensor for tensor in tensors if tensor.name != "model.norm.weight"], *rest)

    monkeypatch.setattr(Stream, "offer", without_the_norm)
    for format_, name in (("safetensors", "model.norm.weight"), ("gguf", "output_norm.weight")):
        with pytest.raises(BackendError) as caught:
            export_to(tmp_path / format_, Path(sources["base"]), format=format_)
        assert caught.value.thing == name
        assert not (tmp_path / format_).exists()


@needs_gptqmodel
@pytest.mark.parametrize("after", [1, 2])
def test_a_gptq_run_beside_a_gguf_goes_on_after_a_layer(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Verified, and with moments for the GGUF: every kind of state that a walk brings along."""
    # No more windows are drawn, which would be walked with from the first layer.
    evaluation = FEW["evaluation"] | {"tokens": 512, "max_tokens": 512, "gate": {"*": 50.0}}
    walked: list[int] = []
    layer = Walk._layer

    def counted(self: Walk, index: int, *rest: Any) -> None:
        walked.append(index)
        layer(self, index, *rest)

    monkeypatch.setattr(Walk, "_layer", counted)

    def run(parent: Path, reporter: Reporter | None = None) -> None:
        outputs = [
            {"format": "gptq", "quant": "gptq-int4-g32", "out": parent / "gptq"},
            {"format": "gguf", "quant": "Q4_K_M", "out": parent / "gguf", "options": {"imatrix": "auto"}},
        ]
        wanted = Recipe.build(sources | FEW | {"outputs": outputs, "evaluation": evaluation})
        # Compiled, gptqmodel's kernel takes most of a minute before its first answer.
        with torch.compiler.set_stance("force_eager"):
            result = export(wanted, reporter=reporter)
        assert result.passed
        assert all(folder.verdicts for folder in result.folders)

    run(tmp_path / "whole")
    assert walked == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", Stopping(after))
    assert not (tmp_path / "again" / "gptq").exists()
    walked.clear()
    run(tmp_path / "again")
    assert walked == list(range(after, 3))
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")
