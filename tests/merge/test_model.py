"""What is refused of a base as a whole, and the order in which the merged model is walked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import MissingTensorError, QuantizedBaseError, RefusalError
from exporter.inputs.checkpoint import Checkpoint
from exporter.merge.model import plan_merge
from tests.exports import refused
from tests.folders import copy, edit_json, edit_tensors

Make = Callable[..., Path]

QUANTIZATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}),
    "awq": ("quantization_config", {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}),
    "bitsandbytes": ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes, 8 bits": ("quantization_config", {"load_in_8bit": True}),
    "fp8": ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "compressed-tensors": ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": {}}),
    "compressed-tensors, old": ("compression_config", {"quant_method": "compressed-tensors"}),
    "mxfp4": ("quantization_config", {"quant_method": "mxfp4"}),
    "of the future": ("quantization_config", {"bits": 3}),
}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_base_that_says_it_is_quantized(make_base: Make, make_adapter: Make, tmp_path: Path, kind: str) -> None:
    original = make_base()
    base = copy(original, tmp_path / "base")
    key, value = QUANTIZATIONS[kind]
    edit_json(base / "config.json", **{key: value})
    caught = refused(QuantizedBaseError, tmp_path / "out", base, make_adapter(original))
    assert "config.json" in caught.thing
    assert kind.partition(",")[0] in caught.found or kind == "of the future"
    assert "16-bit" in caught.remedy


@pytest.mark.parametrize("value", ["fp8", ["gptq"], True], ids=repr)
def test_base_with_an_unreadable_quantization(make_base: Make, tmp_path: Path, value: Any) -> None:
    base = copy(make_base(), tmp_path / "base")
    edit_json(base / "config.json", quantization_config=value)
    refused(QuantizedBaseError, tmp_path / "out", base)


@pytest.mark.parametrize("value", [None, {}])
def test_base_that_says_it_is_not_quantized(make_base: Make, tmp_path: Path, value: Any) -> None:
    base = copy(make_base(), tmp_path / "base")
    edit_json(base / "config.json", quantization_config=value)
    assert plan_merge(Checkpoint.open(base), (), "m").tensors


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_base_whose_tensors_are_quantized(make_base: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    base, name = copy(make_base(), tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert refused(QuantizedBaseError, tmp_path / "out", base).thing == name


def test_packed_weights_beside_the_others(make_base: Make, tmp_path: Path) -> None:
    # GPTQ and AWQ put them under names of their own.
    base, name = copy(make_base(), tmp_path / "base"), "model.layers.0.mlp.up_proj.qweight"
    packed = torch.zeros(8, 128, dtype=torch.int32)
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: packed}))
    assert refused(QuantizedBaseError, tmp_path / "out", base).thing == name


def test_tied_base_without_an_embedding(make_base: Make, tmp_path: Path) -> None:
    base = copy(make_base(tied=True), tmp_path / "base")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]

    edit_tensors(base / "model.safetensors", drop)
    assert refused(MissingTensorError, tmp_path / "out", base).thing == "model.embed_tokens.weight"


def test_every_refusal_is_a_value_error_too() -> None:
    # Callers of the Python API may catch what they know.
    assert issubclass(RefusalError, ValueError)


def test_walk_is_in_model_order(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)]
    stored = ["lm_head.weight", "model.norm.weight", *reversed(names), "model.embed_tokens.weight"]
    save_file({name: torch.zeros(2, 2) for name in stored}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    model = plan_merge(Checkpoint.open(tmp_path), (), "m")
    walked = [tensor.name for tensor in model.tensors]
    assert walked == ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
