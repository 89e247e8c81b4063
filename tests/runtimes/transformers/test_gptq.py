"""transformers on GPTQ folders: the scores are those of the unpacked weights, and loading them is as strict."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from exporter.backends.gptq.bit_packing import CheckpointFormat
from exporter.errors import RuntimeScoreError, RuntimeUnavailableError
from exporter.libraries import gptqmodel
from exporter.runtimes.transformers.runtime import Transformers
from tests.commands import run
from tests.folders import edit_json, edit_tensors
from tests.gptq import make_gptq, needs_gptqmodel, unpack_script
from tests.merged import random_windows

WINDOWS = random_windows(2, 32, 384)


def score(folder: Path, runtime: Transformers | None = None) -> npt.NDArray[np.float64]:
    return (runtime or Transformers()).score(folder, WINDOWS, lambda _: None).log_probabilities


@pytest.mark.parametrize("missing", [("gptqmodel",), ("optimum", "gptqmodel")])
def test_without_its_packages_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: missing)
    packed, plain = make_gptq(tmp_path)
    with pytest.raises(RuntimeUnavailableError) as caught:
        score(packed)
    assert all(name in caught.value.found for name in missing)
    assert "make gptqmodel" in caught.value.remedy
    assert "--runtime vllm" in caught.value.remedy
    assert score(plain).shape == (2, 15)


def test_at_least_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert gptqmodel.worker_count() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert gptqmodel.worker_count() == 8


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "written"),
    [(4, 32, True, "gptq"), (4, 64, False, "gptq_v2"), (8, -1, True, "gptq"), (3, 32, True, "gptq")],
)
def test_scores_are_those_of_the_unpacked_weights(
    tmp_path: Path, bits: int, group_size: int, sym: bool, written: CheckpointFormat
) -> None:
    packed, plain = make_gptq(tmp_path, bits=bits, group_size=group_size, sym=sym, checkpoint_format=written)
    runtime = Transformers()
    found = score(packed, runtime)
    assert "gptqmodel 7.6" in runtime.version()
    unpack_script().unpack_folder(packed, tmp_path / "unpacked")
    # Its kernel rounds the products of codes and scales to float16.
    assert np.abs(found - score(tmp_path / "unpacked")).max() < 1e-3
    assert np.abs(found - score(plain)).max() < 1e-3
    assert "gptqmodel" not in Transformers().version()


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / "model.safetensors", lambda tensors: tensors.__delitem__(name))


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(4)})
    )


def configure(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", quantization_config=config["quantization_config"] | changes)

    return change


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize(
    "damage",
    [
        drop(f"{LAYER}.qweight"), drop(f"{LAYER}.qzeros"), drop(f"{LAYER}.scales"), drop("lm_head.weight"),
        add(f"{LAYER}.weight"), add("other"), configure(bits=8), configure(bits=5), configure(group_size=64),
        configure(group_size="?"),
    ],
    ids=["qweight", "qzeros", "scales", "head", "both", "other", "bits", "no-bits", "group", "no-group"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    packed, _ = make_gptq(tmp_path)
    damage(packed)
    with pytest.raises(RuntimeScoreError) as caught:
        score(packed)
    assert caught.value.thing == "packed"


QUIET = """
import os, sys
from exporter.libraries.gptqmodel import WORKERS, import_quietly
os.environ.pop(WORKERS, None)
before = dict(os.environ)
import_quietly()
assert "gptqmodel" in sys.modules
assert int(os.environ.pop(WORKERS)) >= 2
assert dict(os.environ) == before
from peft import LoraConfig, get_peft_model
import torch
get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
"""


@pytest.mark.slow
@needs_gptqmodel
def test_importing_it_is_quiet_and_leaves_the_environment_alone() -> None:
    result = run(program=QUIET)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "gptqmodel" not in result.stderr.lower()
