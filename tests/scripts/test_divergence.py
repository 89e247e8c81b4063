"""scripts/divergence.py: both forms of the KL divergence of one artifact, from its whole predictions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if str(SCRIPTS) not in sys.path:
    # The scripts import each other by plain names, as they do when they are run.
    sys.path.insert(0, str(SCRIPTS))

import divergence  # noqa: E402

from exporter.adapter import Adapter  # noqa: E402
from exporter.calibration import make_windows  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.model import plan_merge  # noqa: E402
from exporter.recipe import Calibration, Evaluation  # noqa: E402
from exporter.verify.reference import score_reference  # noqa: E402
from tests.exports import export_to  # noqa: E402
from tests.predictions import top_of  # noqa: E402


def test_the_likeliest_tokens_are_those_that_a_server_gives() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 40)).astype(np.float32)
    ids, log_probabilities = divergence.likeliest(torch.from_numpy(logits), 7)
    expected = top_of(logits[None], 7)
    assert np.array_equal(ids.numpy(), expected.ids[0])
    assert log_probabilities.numpy() == pytest.approx(expected.log_probabilities[0], abs=1e-6)


def test_both_forms_of_a_model_folder(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Few tokens give less than the whole divergence, more give more of it, and all of them give it."""
    base = make_base("qwen2")
    adapter = make_adapter(base)
    # Without the adapter, so that there is a divergence to see.
    export_to(tmp_path / "out", base, quant="fp32", name="model")
    model = plan_merge(Checkpoint.open(base), (Adapter.open(adapter),), "model")
    windows = make_windows(Calibration(text=Path(__file__)), Evaluation(tokens=128, n_ctx=64), model.tokenizer)
    reference = score_reference(model, windows, "cpu", threads=1)
    means, whole = [], 0.0
    for k in (5, 20, model.config["vocab_size"]):
        comparison, found = divergence.compare_with(reference, tmp_path / "out", k)
        assert comparison.divergence is not None
        assert comparison.top_k_divergence is not None
        assert comparison.top_k_divergence.k == k
        whole = comparison.divergence.mean
        means.append(comparison.top_k_divergence.mean)
        share, _, ends = divergence.ratio(found).partition(" (")
        least, largest = map(float, ends.removesuffix(")").split(" to "))
        assert float(share) == pytest.approx(means[-1] / whole, abs=6e-4)
        assert least <= float(share) <= largest <= 1
    assert 0 < means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(whole, rel=1e-3)
