"""DoRA against peft's own float32 merge and its own unmerged forward, with adapters that peft made and trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.adapters.adapter import Adapter
from exporter.errors import (
    AdapterError,
    AdapterShapeError,
    NonFiniteTensorError,
    UnsupportedAdapterError,
    ZeroDeltaError,
)
from exporter.reference.predictions import score_reference
from tests.commands import run
from tests.exports import merge_with_us, refused
from tests.folders import copy, edit_json, edit_tensors, hashes
from tests.merged import load_peft, merged_model, peft_log_probabilities, random_windows
from tests.peft_merge import assert_same_merge, merge_with_peft

Make = Callable[..., Path]

ROOT = Path(__file__).resolve().parents[2]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GATE = "base_model.model.model.layers.0.mlp.gate_proj"
MAGNITUDE = f"{GATE}.lora_magnitude_vector"
RAGGED = {"hidden": 96, "intermediate": 200, "heads": 3, "kv_heads": 1, "head_dim": 24}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(base: Path, folder: Path, **config: Any) -> Path:
    """Let peft make a DoRA adapter, train it for a few steps, and save it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", "use_dora": True} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    ids = torch.randint(0, 300, (4, 32))
    for _ in range(6):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def as_plain_lora(adapter: Path, folder: Path) -> Path:
    """The same adapter without magnitudes."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "magnitude" in name]:
            del tensors[name]

    copy(adapter, folder)
    edit_json(folder / CONFIG, use_dora=False)
    edit_tensors(folder / WEIGHTS, drop)
    return folder


@pytest.fixture(scope="module")
def base(make_base: Make) -> Path:
    return make_base()


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("dora") / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "out"


def assert_merge_of_peft(ours: dict[str, torch.Tensor], base: Path, adapter: Path) -> None:
    """The merge is that of peft, and its rows have the lengths that were trained."""
    assert_same_merge(ours, merge_with_peft(base, [adapter]), torch.float32)
    magnitudes = {name: tensor for name, tensor in load_file(adapter / WEIGHTS).items() if "magnitude" in name}
    assert magnitudes
    for name, magnitude in magnitudes.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        torch.testing.assert_close(ours[f"{module}.weight"].norm(dim=1), magnitude)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_export_equals_the_merge_of_peft(make_base: Make, tmp_path: Path, family: str) -> None:
    base, out = make_base(family), tmp_path / "out"
    adapter = train(base, tmp_path / "adapter")
    inputs = ("--base", base, "--adapter", adapter, "--format", "safetensors", "--quant", "fp32")
    result = run("export", *inputs, "--out", out, "--no-verify", "--json")
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    jsonschema.validate(manifest, json.loads((ROOT / "docs" / "export.schema.json").read_text(encoding="utf-8")))
    assert manifest["inputs"][1]["adapter"] == {
        "method": "dora", "ranks": [4], "scales": [2.0], "targets": 14, "modules": sorted(ALL),
    }  # fmt: skip
    ours = load_file(out / "model.safetensors")
    assert_merge_of_peft(ours, base, adapter)
    # LoRA alone would be another model.
    without = merge_with_peft(base, [as_plain_lora(adapter, tmp_path / "plain")])
    assert max(float((ours[name] - without[name]).abs().max()) for name in ours) > 1e-3


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ragged shapes": (RAGGED, {"r": 5}),
    "rank and alpha patterns, rsLoRA": (
        RAGGED,
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ),
    "untied head": ({"tied": False}, {"target_modules": ["q_proj", "lm_head"]}),
    "float32 base": ({"dtype": "float32"}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_that_of_peft(make_base: Make, tmp_path: Path, variant: str) -> None:
    options, config = VARIANTS[variant]
    base = make_base(**options)
    adapter = train(base, tmp_path / "adapter", **config)
    assert_merge_of_peft(merge_with_us(tmp_path / "out", base, adapter), base, adapter)


def test_same_bytes_for_any_block_size(make_base: Make, tmp_path: Path) -> None:
    base = make_base(**RAGGED)
    adapter = train(base, tmp_path / "adapter")
    merge_with_us(tmp_path / "whole", base, adapter, threads=1)
    merge_with_us(tmp_path / "blocks", base, adapter, block_bytes=4096, threads=3)
    one, other = (hashes(tmp_path / name) for name in ("whole", "blocks"))
    assert one["model.safetensors"] == other["model.safetensors"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_reference_is_the_unmerged_forward_of_peft(make_base: Make, tmp_path: Path, family: str) -> None:
    base = make_base(family)
    adapter, windows = train(base, tmp_path / "adapter"), random_windows(3, 48, 300)
    found = score_reference(merged_model(base, adapter), windows, "cpu").scores.log_probabilities
    expected = peft_log_probabilities(load_peft(base, adapter), windows)[:, windows.first_scored :]
    without = peft_log_probabilities(load_peft(base), windows)[:, windows.first_scored :]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected - without).max() > 0.01


@pytest.mark.slow
def test_export_is_verified_and_plain_lora_in_its_place_is_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    (tmp_path / "text.txt").write_text(topics["assignment"] + topics["class"])
    inputs = ("--base", base, "--adapter", adapter)
    scored = ("--calibration", tmp_path / "text.txt", "--eval-tokens", "512", "--eval-window", "128")
    output = ("--format", "gguf", "--quant", "F16", "--json")
    result = run("export", *inputs, *scored, *output, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (artifact,) = json.loads(result.stdout)["artifacts"]
    assert artifact["verification"]["verdict"] == "passed"
    assert artifact["weights"]["survival"] == pytest.approx(1, abs=0.01)
    assert artifact["weights"]["broken"] == []
    # The same without magnitudes, published under the adapter's name.
    wrong = ("--base", base, "--adapter", as_plain_lora(adapter, tmp_path / "plain"))
    result = run("export", *wrong, *output, "--out", tmp_path / "wrong", "--no-verify")
    assert result.returncode == 0, result.stderr
    assert run("verify", tmp_path / "wrong", *wrong, "--files-only").returncode == 0
    assert run("verify", tmp_path / "wrong", *inputs, "--files-only").returncode == 3


# --- refusals --------------------------------------------------------------------------------------------------------


def test_embedding_is_refused(base: Path, tmp_path: Path, out: Path) -> None:
    made = train(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    caught = refused(UnsupportedAdapterError, out, base, made)
    assert "embed_tokens" in caught.thing
    assert "peft" in caught.remedy


@pytest.mark.parametrize("first", [True, False])
def test_second_adapter_on_the_same_tensors_is_refused(
    base: Path, adapter: Path, make_adapter: Make, out: Path, first: bool
) -> None:
    lora = make_adapter(base)
    caught = refused(UnsupportedAdapterError, out, base, *((adapter, lora) if first else (lora, adapter)))
    assert "2 adapters" in caught.found


def test_second_adapter_on_other_tensors_is_merged(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    adapters = [
        train(base, tmp_path / "adapter", target_modules=["q_proj"]),
        make_adapter(base, target_modules=["v_proj"]),
    ]
    ours = merge_with_us(tmp_path / "out", base, *adapters)
    assert_same_merge(ours, merge_with_peft(base, adapters), torch.float32)
    windows = random_windows(2, 32, 300)
    found = score_reference(merged_model(base, *adapters), windows, "cpu").scores.log_probabilities
    expected = peft_log_probabilities(load_peft(base, *adapters), windows)[:, windows.first_scored :]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_magnitude_that_the_configuration_does_not_speak_of(
    base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    changed = copy(adapter, tmp_path / "changed")
    edit_json(changed / CONFIG, use_dora=None)
    assert "lora_magnitude_vector" in refused(UnsupportedAdapterError, out, base, changed).thing


def test_setting_without_magnitudes(base: Path, make_adapter: Make, tmp_path: Path, out: Path) -> None:
    changed = copy(make_adapter(base), tmp_path / "changed")
    edit_json(changed / CONFIG, use_dora=True)
    assert "lora_magnitude_vector" in refused(AdapterError, out, base, changed).expected


FAULTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], type[AdapterError | NonFiniteTensorError]]] = {
    "one row too many": (lambda magnitude: torch.ones(129), AdapterShapeError),
    "a number for all": (lambda magnitude: torch.ones(1), AdapterShapeError),
    "a matrix": (lambda magnitude: magnitude[None].contiguous(), AdapterShapeError),
    "whole numbers": (lambda magnitude: magnitude.to(torch.int32), AdapterShapeError),
    "NaN": (lambda magnitude: magnitude * float("nan"), NonFiniteTensorError),
    "zeros": (torch.zeros_like, ZeroDeltaError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_magnitude_is_refused(base: Path, adapter: Path, tmp_path: Path, out: Path, fault: str) -> None:
    change, error = FAULTS[fault]
    changed = copy(adapter, tmp_path / "changed")
    edit_tensors(changed / WEIGHTS, lambda tensors: tensors.update({MAGNITUDE: change(tensors[MAGNITUDE])}))
    assert refused(error, out, base, changed).thing == MAGNITUDE


def test_magnitudes_of_files_of_other_versions_of_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    changed = copy(adapter, tmp_path / "changed")
    edit_tensors(changed / WEIGHTS, lambda tensors: tensors.update({f"{MAGNITUDE}.weight": tensors.pop(MAGNITUDE)}))
    assert Adapter.open(changed).updates.keys() == Adapter.open(adapter).updates.keys()
