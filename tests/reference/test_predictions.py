"""The reference: base + adapters as trained, unrounded and unmerged, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import ExporterError, RuntimeScoreError
from exporter.merge.model import MergedModel
from exporter.plan.estimate import PlannedWalk, layer_bytes
from exporter.reference.predictions import score_reference
from exporter.tokens.windows import TokenSets
from tests.folders import copy, edit_json
from tests.merged import drop_tensor, load_peft, merged_model, peft_log_probabilities, random_windows

WINDOWS = random_windows(2, 32, 384)


def reference(base: Path, *adapters: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    return score_reference(merged_model(base, *adapters), WINDOWS, "cpu").scores.log_probabilities


def peft(base: Path, *adapters: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    return peft_log_probabilities(load_peft(base, *adapters), WINDOWS)[:, WINDOWS.first_scored :]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen2", {"dtype": "bfloat16"}),
        ("qwen3", {"use_rslora": True, "r": 8}),
        ("qwen2", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}}),
        ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
        ("qwen2", {"target_modules": ["v_proj", "embed_tokens"]}),
    ],
    ids=["qwen2", "qwen3", "bf16", "rslora", "patterns", "head", "embedding"],
)
def test_scores_are_those_of_peft_unmerged(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    base = make_base(family)
    adapter = make_adapter(base, **config)
    found = reference(base, adapter)
    assert np.abs(found - peft(base, adapter)).max() < 1e-5
    assert np.abs(found - peft(base)).max() > 1e-3


def test_without_an_adapter_it_is_the_base_in_float32(make_base: Callable[..., Path]) -> None:
    base = make_base("qwen2", tied=False)
    assert np.abs(reference(base) - peft(base)).max() < 1e-5


def test_two_adapters_are_added(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> None:
    base = make_base("qwen2")
    one, two = make_adapter(base, seed=1), make_adapter(base, seed=2, r=8, target_modules=["q_proj", "down_proj"])
    both = reference(base, one, two)
    assert np.abs(both - peft(base, one, two)).max() < 1e-5
    # By hand: the deltas of both on the base's own weights.
    model = load_peft(base)
    weights = model.state_dict()
    for adapter in (one, two):
        merged = load_peft(base, adapter).merge_and_unload().state_dict()
        original = load_peft(base).state_dict()
        for name, weight in weights.items():
            weight += merged[name] - original[name]
    model.load_state_dict(weights)
    by_hand = peft_log_probabilities(model, WINDOWS)[:, WINDOWS.first_scored :]
    assert np.abs(both - by_hand).max() < 1e-4
    for alone in ((one,), (two,)):
        assert np.abs(both - reference(base, *alone)).max() > 1e-3


def test_the_same_adapter_twice_counts_twice(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> None:
    base = make_base("qwen2")
    adapter = make_adapter(base, target_modules=["up_proj"])
    doubled = make_adapter(base, target_modules=["up_proj"], lora_alpha=16)
    assert np.abs(reference(base, adapter, adapter) - peft(base, doubled)).max() < 1e-4


def test_every_window_is_reported(make_base: Callable[..., Path]) -> None:
    seen: list[int] = []
    found = score_reference(merged_model(make_base("qwen2")), WINDOWS, "cpu")
    found.complete(seen.append)
    assert seen == [1, 1]
    found.complete(seen.append)
    assert seen == [1, 1]


def test_scores_do_not_depend_on_when_they_are_made(make_base: Callable[..., Path]) -> None:
    """With the logits that something is compared with, or by themselves."""
    model = merged_model(make_base("qwen2"))
    alone, beside = score_reference(model, WINDOWS, "cpu"), score_reference(model, WINDOWS, "cpu")
    for _ in beside.logits(1):
        pass
    seen: list[int] = []
    beside.complete(seen.append)
    assert seen == [1]
    assert np.array_equal(alone.scores.log_probabilities, beside.scores.log_probabilities)
    assert np.array_equal(alone.scores.top_tokens, beside.scores.top_tokens)
    assert (alone.scores.log_probabilities < 0).all()


def test_a_base_that_transformers_cannot_load_fails(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = copy(make_base("qwen2"), tmp_path / "base")
    model = merged_model(base)
    edit_json(base / "config.json", model_type="nothing")
    with pytest.raises(RuntimeScoreError, match="nothing"):
        score_reference(model, WINDOWS, "cpu")


def test_a_base_that_changes_meanwhile_fails(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = copy(make_base("qwen2"), tmp_path / "base")
    model = merged_model(base)
    drop_tensor(base / "model.safetensors", "model.norm.weight")
    with pytest.raises(ExporterError, match=r"model\.safetensors"):
        score_reference(model, WINDOWS, "cpu")


def test_memory_is_one_layer_and_not_the_model(make_base: Callable[..., Path]) -> None:
    few, many = merged_model(make_base("qwen2", layers=2)), merged_model(make_base("qwen2", layers=8))
    assert len(layer_bytes(few)) == 2
    assert len(layer_bytes(many)) == 8
    decoder = load_peft(make_base("qwen2", layers=2)).model.layers[0]
    assert layer_bytes(few)[0] == sum(4 * parameter.numel() for parameter in decoder.parameters())

    def memory(model: MergedModel, windows: int) -> int:
        return PlannedWalk(model, (), TokenSets(random_windows(windows, 32, 384), None), "float32").memory

    assert memory(few, 2) == memory(many, 2)
    assert memory(few, 2) < memory(few, 200)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_logits_are_those_of_the_whole_model(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], family: str, tied: bool
) -> None:
    base = make_base(family, tied=tied)
    adapter = make_adapter(base)
    found = score_reference(merged_model(base, adapter), WINDOWS, "cpu")
    with torch.no_grad():
        whole = load_peft(base, adapter)(input_ids=torch.tensor(WINDOWS.ids)).logits
    for window in range(2):
        ours = torch.cat([logits for _, logits in found.logits(window)])
        assert (ours - whole[window, WINDOWS.first_scored : -1]).abs().max() < 1e-4


def test_layers_are_reported(make_base: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    score_reference(merged_model(make_base("qwen2")), WINDOWS, "cpu", on_layer=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
