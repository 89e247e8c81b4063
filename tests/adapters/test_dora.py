"""DoRA, which is LoRA with a magnitude for each output of a layer, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.errors import UnsupportedAdapterError
from tests.exports import refused
from tests.folders import copy, edit_json, edit_tensors

Make = Callable[..., Path]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAGNITUDE = "base_model.model.model.layers.0.mlp.gate_proj.lora_magnitude_vector.weight"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "out"


def test_magnitude_that_the_configuration_does_not_speak_of(make_base: Make, make_adapter: Make, out: Path) -> None:
    base = make_base()
    adapter = copy(make_adapter(base), out.parent.parent / "adapter")
    edit_tensors(adapter / WEIGHTS, lambda tensors: tensors.update({MAGNITUDE: torch.ones(128)}))
    assert refused(UnsupportedAdapterError, out, base, adapter).thing == MAGNITUDE


def test_setting_without_magnitudes(make_base: Make, make_adapter: Make, out: Path) -> None:
    base = make_base()
    adapter = copy(make_adapter(base), out.parent.parent / "adapter")
    edit_json(adapter / CONFIG, use_dora=True)
    assert "use_dora" in refused(UnsupportedAdapterError, out, base, adapter).thing


def test_what_peft_saves(make_base: Make, make_adapter: Make, out: Path) -> None:
    base = make_base()
    made = make_adapter(base, use_dora=True)
    assert "use_dora" in refused(UnsupportedAdapterError, out, base, made).thing
    # And from the file alone, if the configuration has lost the setting.
    changed = copy(made, out.parent.parent / "changed")
    edit_json(changed / CONFIG, use_dora=None)
    assert "lora_magnitude_vector" in refused(UnsupportedAdapterError, out, base, changed).thing
