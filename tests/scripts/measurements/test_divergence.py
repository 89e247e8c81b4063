"""scripts/measurements/divergence.py: both forms of the KL divergence of one artifact, from its whole predictions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.adapters.adapter import Adapter
from exporter.inputs.checkpoint import Checkpoint
from exporter.merge.model import plan_merge
from exporter.recipe import Calibration, Evaluation
from exporter.reference.predictions import score_reference
from exporter.tokens.windows import make_windows
from scripts.measurements import divergence
from tests.exports import export_to
from tests.predictions import top_of


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


def test_two_artifacts_are_compared_window_by_window() -> None:
    """What both have in common drops out: the windows are far more unlike than the artifacts are."""
    windows = np.array([[0.1], [0.5], [0.9]]) + np.array([0.0, 0.01])
    worse = windows + np.array([[0.02], [0.05], [0.05]])
    (found,) = divergence.paired({"worse": worse, "better": windows})
    # Differences of 0.02, 0.05 and 0.05 vary by sqrt(0.0003); over three windows 0.01, and t(2) is 4.30265.
    assert found.difference == pytest.approx(0.04)
    assert found.stderr == pytest.approx(0.01)
    assert found.interval == pytest.approx((0.04 - 0.0430265, 0.04 + 0.0430265), rel=1e-5)
    row = divergence.paired_table([found]).splitlines()[-1]
    assert row.split() == ["worse", "-", "better", "+0.04000", "0.01000", "-0.00303", "to", "+0.08303"]


def test_every_two_are_compared_and_one_window_has_no_interval() -> None:
    values = {name: np.full((1, 2), number) for number, name in enumerate("abc")}
    found = divergence.paired(values)
    assert [(one.first, one.second, one.difference) for one in found] == [
        ("a", "b", -1),
        ("a", "c", -2),
        ("b", "c", -1),
    ]
    assert {one.interval for one in found} == {None}
    assert divergence.paired_table(found).splitlines()[-1].split() == ["b", "-", "c", "-1.00000", "-", "-"]


def test_artifacts_of_one_name_are_told_apart() -> None:
    assert divergence.names_of([Path("/x/one/m.gguf"), Path("/x/two/m.gguf")]) == ["one/m.gguf", "two/m.gguf"]
    assert divergence.names_of([Path("/x/one/m.gguf"), Path("/x/two/n.gguf")]) == ["m.gguf", "n.gguf"]


def test_the_script_prints_the_paired_difference(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base("qwen2")
    adapter = make_adapter(base)
    export_to(tmp_path / "without" / "out", base, quant="fp32", name="model")
    export_to(tmp_path / "with" / "out", base, adapter, quant="fp32", name="model")
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    command = ["divergence.py", "--base", base, "--adapter", adapter, "--calibration", text, "--tokens", "1024"]
    folders = [tmp_path / name / "out" for name in ("without", "with")]
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", [*map(str, command), *map(str, folders), "--json", str(file)])
    assert divergence.main() == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    pair = found["without/out"]["paired"]["with/out"]
    means = [found[name]["divergence"]["mean"] for name in ("without/out", "with/out")]
    assert pair["difference"] == pytest.approx(means[0] - means[1])
    assert pair["difference"] > 0
    assert pair["interval"][0] < pair["difference"] < pair["interval"][1]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:4] == ["without/out", "-", "with/out", f"{pair['difference']:+.5f}"]
