"""scripts/measurements/shortfalls.py: a sound file, one without its adapter and one that is broken, asked together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.measurements import shortfalls


def test_what_is_broken_falls_short_and_what_is_sound_does_not(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_base("qwen3")
    adapter = make_adapter(base)
    monkeypatch.setattr(shortfalls, "TYPES", ("F16",))
    work, file = tmp_path / "work", tmp_path / "found.json"
    command = ["shortfalls.py", "--base", base, "--adapter", adapter, "--work", work, "--json", file]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert shortfalls.main() == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    sound = ("gguf F16", "safetensors bf16")
    assert set(found) == {*sound, "F16, adapter left out", *(f"F16, {name}" for name in shortfalls.FAULTS)}
    assert max(found[name] for name in sound) < 0.01
    assert min(value for name, value in found.items() if name not in sound) > found["gguf F16"]
    assert found["F16, noise of half their deviation on all projections"] > 0.01
    assert f"{found['F16, adapter left out']:.3f}" in capsys.readouterr().out
    assert list(work.iterdir()) == []
