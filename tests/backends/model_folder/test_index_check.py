"""The index of a model folder, held against its shards, and tensors that are no part of the model.

Our reader judges our folders here. transformers and safetensors load such shards, by their index, in
tests/backends/safetensors/test_backend.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.backends.registry import load_backend
from exporter.merge.model import MergedModel
from tests.exports import export_to
from tests.folders import copy, edit_json, edit_tensors
from tests.merged import merged_model

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def exported(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[MergedModel, Path]:
    """A model and a folder of it in several shards; to be copied before it is changed."""
    base, out = make_base("qwen3", tied=False), tmp_path_factory.mktemp("index") / "out"
    export_to(out, base, quant=("bf16",), options={"max_shard_size": "100KB"})
    assert len(list(out.glob("*.safetensors"))) > 2
    return merged_model(base), out


def faults(model: MergedModel, folder: Path) -> tuple[str, ...]:
    reader = load_backend("safetensors").read(model, "bf16", folder)
    assert reader is not None
    reader.close()
    return reader.faults


def weight_map(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_sound_folder_has_no_fault(exported: tuple[MergedModel, Path]) -> None:
    assert faults(*exported) == ()


def test_shards_without_an_index_are_flagged(exported: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = exported[0], copy(exported[1], tmp_path / "out")
    count = len(set(weight_map(folder).values()))
    (folder / INDEX).unlink()
    assert faults(model, folder) == (f"{INDEX} is missing, and there are {count} shards",)


def test_one_file_without_an_index_has_the_name_that_is_looked_for(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("qwen3")
    export_to(tmp_path / "out", base, quant=("bf16",))
    model = merged_model(base)
    assert faults(model, tmp_path / "out") == ()
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "weights.safetensors")
    assert faults(model, tmp_path / "out") == (f"{INDEX} is missing, and weights.safetensors is not model.safetensors",)


def test_an_index_that_leaves_a_tensor_out_is_flagged(exported: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = exported[0], copy(exported[1], tmp_path / "out")
    named = weight_map(folder)
    shard = named.pop(NORM)
    edit_json(folder / INDEX, weight_map=named)
    assert faults(model, folder) == (f"{INDEX} does not name {NORM}, which is in {shard}",)
    edit_json(folder / INDEX, weight_map={})
    found = faults(model, folder)
    assert found[3] == f"so it is with {len(named) - 2} more tensors"
    assert found[4].endswith(f"is not named by {INDEX}")


def test_an_index_that_points_elsewhere_is_flagged(exported: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = exported[0], copy(exported[1], tmp_path / "out")
    named = weight_map(folder)
    for elsewhere in (next(shard for shard in named.values() if shard != named[NORM]), "nowhere.safetensors", None):
        edit_json(folder / INDEX, weight_map=named | {NORM: elsewhere})
        assert faults(model, folder) == (f"{INDEX} says that {NORM} is in {elsewhere}, which does not hold it",)
    edit_json(folder / INDEX, weight_map=named | {"more.weight": named[NORM]})
    assert faults(model, folder) == (f"{INDEX} says that more.weight is in {named[NORM]}, which does not hold it",)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": [1]}'])
def test_an_index_that_cannot_be_read_is_flagged(
    exported: tuple[MergedModel, Path], tmp_path: Path, content: str
) -> None:
    model, folder = exported[0], copy(exported[1], tmp_path / "out")
    (folder / INDEX).write_text(content)
    (found,) = faults(model, folder)
    assert found.startswith(f"{INDEX} has no weight_map that can be read")


def test_a_tensor_in_two_shards_is_flagged(exported: tuple[MergedModel, Path], tmp_path: Path) -> None:
    """Which of the two is loaded is up to the loader."""
    model, folder = exported[0], copy(exported[1], tmp_path / "out")
    last = weight_map(folder)[NORM]
    first = min(weight_map(folder).values())
    norm = load_file(folder / last)[NORM]
    edit_tensors(folder / first, lambda tensors: tensors.update({NORM: torch.zeros_like(norm)}))
    assert faults(model, folder) == (f"{NORM} is in {first} and in {last}",)


def test_a_shard_that_the_index_does_not_name_is_flagged(exported: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = exported[0], copy(exported[1], tmp_path / "out")
    save_file({"more.weight": torch.zeros(2)}, folder / "model-more.safetensors", metadata={"format": "pt"})
    assert faults(model, folder) == (
        f"{INDEX} does not name more.weight, which is in model-more.safetensors",
        f"model-more.safetensors is not named by {INDEX}",
        "more.weight is not a tensor of the model",
    )


def test_a_tensor_that_is_not_the_model_s_is_flagged(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3")
    export_to(tmp_path / "out", base, quant=("bf16",))
    extra = {f"model.layers.{number}.mlp.more.weight": torch.zeros(2) for number in range(5)}
    edit_tensors(tmp_path / "out" / "model.safetensors", lambda tensors: tensors.update(extra))
    assert faults(merged_model(base), tmp_path / "out") == (
        *[f"{name} is not a tensor of the model" for name in sorted(extra)[:3]],
        "so it is with 2 more tensors",
    )
