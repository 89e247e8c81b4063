"""The transformers runtime: its scores are the model's own, and it loads every weight or refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import RecipeError, RuntimeScoreError
from exporter.runtimes.base import TokenScores, score_logits
from exporter.runtimes.registry import load_runtime
from exporter.runtimes.transformers.runtime import Transformers, load_model
from tests.folders import copy, edit_json, edit_tensors
from tests.merged import drop_tensor, load_peft, peft_log_probabilities, random_windows

TOKENS = 384


def score(folder: Path, **kwargs: Any) -> TokenScores:
    return Transformers().score(folder, random_windows(2, 32, TOKENS), lambda _: None)


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)])
def test_scores_are_those_of_the_whole_logits(make_base: Callable[..., Path], family: str, tied: bool) -> None:
    base = make_base(family, tied=tied, dtype="float32")
    windows = random_windows(2, 32, TOKENS)
    found = Transformers().score(base, windows, lambda _: None)
    model = load_peft(base)
    expected = peft_log_probabilities(model, windows)[:, windows.first_scored :]
    assert np.abs(found.log_probabilities - expected).max() < 1e-5
    top = model(input_ids=torch.tensor(windows.ids)).logits[:, windows.first_scored : -1].argmax(-1)
    assert np.array_equal(found.top_tokens, top.numpy())


def test_a_folder_is_scored_in_its_own_dtype(make_base: Callable[..., Path]) -> None:
    base = make_base("qwen2")
    assert load_model(base, "auto", "cpu").dtype == torch.bfloat16
    rounded, exact = score(base), peft_log_probabilities(load_peft(base), random_windows(2, 32, TOKENS))[:, 16:]
    difference = np.abs(rounded.log_probabilities - exact).max()
    assert 1e-5 < difference < 0.2


def test_every_window_is_reported(make_base: Callable[..., Path]) -> None:
    seen: list[int] = []
    Transformers().score(make_base("qwen2"), random_windows(3, 16, TOKENS), seen.append)
    assert seen == [1, 1, 1]


@pytest.fixture
def folder(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    return copy(make_base("qwen2", tied=False), tmp_path / "model")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_refused(folder: Path, name: str) -> None:
    drop_tensor(folder / "model.safetensors", name)
    with pytest.raises(RuntimeScoreError, match="missing keys") as caught:
        score(folder)
    assert name in caught.value.found


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.weight", "other"])
def test_an_unexpected_weight_is_refused(folder: Path, name: str) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(128)}))
    with pytest.raises(RuntimeScoreError, match="unexpected keys") as caught:
        score(folder)
    assert name in caught.value.found


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(127, 64)}))
    with pytest.raises(RuntimeScoreError):
        score(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: edit_json(folder / "config.json", model_type="no such type"),
        lambda folder: edit_json(folder / "config.json", num_hidden_layers="two"),
        lambda folder: edit_json(folder / "config.json", num_attention_heads=0),
        lambda folder: edit_json(folder / "config.json", dtype="x"),
        lambda folder: edit_json(folder / "config.json", pad_token_id=10**9),
    ],
    ids=[
        "truncated",
        "noise",
        "no-weights",
        "no-config",
        "config-not-json",
        "model-type",
        "layers",
        "heads",
        "dtype",
        "padding",
    ],
)
def test_a_folder_that_transformers_cannot_load_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(RuntimeScoreError) as caught:
        score(folder)
    assert caught.value.thing == "model"


def test_a_token_beyond_the_embedding_fails(folder: Path) -> None:
    windows = random_windows(1, 16, 10_000)
    with pytest.raises(RuntimeScoreError):
        Transformers().score(folder, windows, lambda _: None)


def test_score_logits_against_numpy_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(7, 11, generator=generator)
    targets = torch.randint(0, 11, (7,), generator=generator)
    right, top = score_logits(logits, targets)
    exact = logits.double().numpy()
    normalizers = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    assert right.dtype == np.float64
    assert np.allclose(right, exact[range(7), targets.numpy()] - normalizers, atol=1e-5)
    assert np.array_equal(top, exact.argmax(1))


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(RecipeError, match="llamacpp, transformers or vllm"):
        load_runtime("onnx")
