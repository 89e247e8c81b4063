"""scripts/measurements/weight_figures.py: groups that lost their values, and the tables of a small folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.backends.weight_reader import StoredWeight, Tolerance
from exporter.verify.weights.limits import LimitCheck
from scripts.measurements import weight_figures
from tests.exports import export_to, pack_to


def test_groups_that_lost_more_than_a_fifth_by_hand() -> None:
    weight = StoredWeight("w", "w", "INT4", (4, 4), 4, 4, Tolerance(1.0, 1.0, 1.0, 0.0, clipped=True))
    merged = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [3, 1, 1, 1], [1, 1, 1, 1]], dtype=np.float32)
    # A scale that lost 30 %, one that lost 10 %, a lost value that is most of its group, and one that grew by a half.
    stored = merged * np.array([[0.7], [0.9], [1.0], [1.5]], dtype=np.float32)
    stored[2] = [0, 1, 1, 1]
    found = weight_figures.lost_groups(stored, merged, weight)
    assert (found.groups, found.lost) == (4, 2)
    assert found.cosine == pytest.approx(1.0)
    found = weight_figures.lost_groups(stored[2:], merged[2:], weight)
    # Of [3, 1, 1, 1], whose squares are 12, the error [-3, 0, 0, 0]: 9 / (3 sqrt(12)).
    assert (found.groups, found.lost) == (2, 1)
    assert found.cosine == pytest.approx(9 / (3 * 12**0.5))
    assert weight_figures.Lost(1, 1, 0.5).plus(found) == weight_figures.Lost(3, 2, found.cosine)


def test_a_smallest_step_of_scales_is_no_loss() -> None:
    weight = StoredWeight("w", "w", "INT4", (1, 4), 4, 4, Tolerance(1.0, 1.0, 1.0, 0.01, clipped=True))
    merged = np.full((1, 4), 0.01, dtype=np.float32)
    assert weight_figures.lost_groups(np.zeros_like(merged), merged, weight).lost == 0


def test_a_figure_is_shown_with_its_limit() -> None:
    assert weight_figures.shown(LimitCheck("group", 0.25, 0.5, "")) == "0.25 (0.5) 0.50"
    assert weight_figures.shown(None) == "-"


@pytest.mark.parametrize(
    ("format_", "quant", "kind"), [("gptq", "gptq-int4-g32", "INT4"), ("gguf", "Q8_0", "Q8_0")], ids=["gptq", "gguf"]
)
def test_what_the_script_prints_of_a_sound_folder(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format_: str,
    quant: str,
    kind: str,
) -> None:
    base = make_base("qwen2")
    adapter = make_adapter(base)
    out, file = tmp_path / "out", tmp_path / "found.json"
    few: dict[str, Any] = {"calibration": {"tokens": 256, "window": 64}, "evaluation": {"tokens": 128, "n_ctx": 64}}
    options = few if format_ == "gptq" else {}
    export_to(out, base, adapter, format=format_, quant=(quant,), **options)
    command = ["weight_figures.py", out, "--base", base, "--adapter", adapter, "--json", file]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert weight_figures.main() == 0
    (found,) = json.loads(file.read_text(encoding="utf-8")).values()
    assert found["broken"] == []
    figures = found["nearest"][kind]
    for measure in weight_figures.MEASURES:
        assert 0 < figures[measure]["value"] < figures[measure]["limit"]
    assert found["survival"] == pytest.approx(1, abs=0.1)
    shown = capsys.readouterr().out
    scored = {"tokens": 128, "n_ctx": 64, "answers": False}
    pack = pack_to(tmp_path / "pack", base, adapter, evaluation=scored)
    monkeypatch.setattr(sys, "argv", list(map(str, ["weight_figures.py", out, "--reference", pack, "--json", file])))
    assert weight_figures.main() == 0
    (estimated,) = json.loads(file.read_text(encoding="utf-8")).values()
    assert estimated["broken"] == []
    exact = figures["relative_error"]["value"]
    assert estimated["nearest"][kind]["relative_error"]["value"] == pytest.approx(exact, rel=0.5)
    assert estimated["survival"] == pytest.approx(found["survival"], abs=0.1)
    row = next(line for line in shown.splitlines() if line.startswith(f"{kind} "))
    error = figures["relative_error"]
    assert f"{error['value']:.3g} ({error['limit']:.3g}) {error['value'] / error['limit']:.2f}" in row
    assert set(found["lost"]) == ({kind} if format_ == "gptq" else set())
    assert ("groups lost more than" in shown) == (format_ == "gptq")
