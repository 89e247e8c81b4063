"""The plugin that has vLLM's CPU build take GPTQ weights of 8 bits: its arithmetic, and where it is asked for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from exporter_vllm_cpu_gptq8 import register
from exporter_vllm_cpu_gptq8.dense import dense_weight
from hypothesis import given
from hypothesis import strategies as st

from exporter.backends.gptq.packing import pack
from exporter.backends.gptq.unpacking import PARTS, unpack_layer
from exporter.runtimes.vllm_server import PLUGIN, ModelConfig, server_environment


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
