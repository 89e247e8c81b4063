"""The tour's memory: one layer, hidden states and a constant, however many layers there are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# Layers of 26 MB in float32: twenty more of them would be 520 MB. Their modules, adapters and plans are 27 MB, and the
# largest of many samples of a heap that two threads take turns in is up to 55 MB above the largest of a few: where in
# the run the peak is changes from run to run, and it does not climb with the layers.
WIDE = {"hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 4, "head_dim": 64}
TOLERANCE_BYTES = 120 << 20


def peak_of(command: Sequence[str]) -> int:
    """Largest resident memory of a run of the command line, in bytes."""
    # Through a small process: the kernel starts a child's figure at its parent's size.
    relay = "import os, sys; a = sys.argv[1:]; print(os.wait4(os.posix_spawn(a[0], a, os.environ), 0)[2].ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", relay, sys.executable, "-m", "exporter", *command],
        check=True, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "4"},
    )  # fmt: skip
    return 1024 * int(done.stdout.split()[-1])


RIDES = {
    "importance matrix": ("export", "--format", "gguf", "--imatrix", "auto"),
    "hessians": ("export", "--format", "gptq"),
    "reference": ("reference", "--eval-tokens", "2048", "--eval-window", "128"),
}
# What each command leaves once it is done.
WRITTEN = {"export": "export.json", "reference": "reference.json"}
CALIBRATED = ("--no-verify", "--calibration-tokens", "512", "--window", "128")


@pytest.mark.slow
@pytest.mark.parametrize("ride", RIDES)
def test_peak_does_not_depend_on_the_number_of_layers(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, ride: str
) -> None:
    """With second moments, with Hessians and solutions, and of the reference; on models of 4 and of 24 layers."""
    peaks = {}
    for layers in (4, 24):
        base = make_base("qwen3", layers=layers, **WIDE)
        adapter = make_adapter(base)
        command, *options = RIDES[ride]
        options += CALIBRATED if command == "export" else ()
        sources = ["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / f"{layers}")]
        peaks[layers] = peak_of([command, *sources, *options, "--quiet"])
        assert (tmp_path / f"{layers}" / WRITTEN[command]).is_file()
    assert abs(peaks[24] - peaks[4]) < TOLERANCE_BYTES, peaks
