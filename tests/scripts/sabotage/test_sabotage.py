"""Artifacts that are broken on purpose: part of scripts/sabotage on the demo, and what it takes for caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from scripts.sabotage.faults import FAULTS, Fault
from scripts.sabotage.sabotage import Verdict, reasons_of, report, tables

CHECKOUT = Path(__file__).resolve().parents[3]


def done(status: int, stdout: str = "", stderr: str = "") -> CompletedProcess[str]:
    return CompletedProcess([], status, stdout, stderr)


def test_names_of_faults_are_different() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        (done(0), ()),
        (done(3, json.dumps({"gguf Q8_0": {"broken": ["a", "b"]}})), ("a", "b")),
        (
            done(1, "", "scoring\nfailed  x.gguf\n  found    nothing\n  expected a file\n  do       …"),
            ("x.gguf: nothing",),
        ),
        (done(2, "", "refused  --adapter\n  found    none\n"), ("--adapter: none",)),
        (done(1, "", "Traceback (most recent call last):\nfailed  x\n  found    y\n"), ()),
        (done(-11), ()),
    ],
)
def test_what_counts_is_a_reason_in_words(found: CompletedProcess[str], reasons: tuple[str, ...]) -> None:
    assert reasons_of(found) == reasons


@pytest.mark.parametrize(
    ("fault", "status", "reasons", "right"),
    [
        (FAULTS[0], 3, ("a",), True),
        (FAULTS[0], 2, ("a",), True),
        (FAULTS[0], 1, ("a",), False),
        (FAULTS[0], 0, (), False),
        (FAULTS[0], 3, (), False),
        (FAULTS[0], -11, (), False),
        (Fault("low bits", parts=("a", "b")), 3, ("x.a.weight is off", "x.b.weight is off"), True),
        (Fault("low bits", parts=("a", "b")), 3, ("x.a.weight is off", "perplexity", "so are 2 more tensors"), False),
        (None, 0, (), True),
        (None, 3, ("a",), False),
    ],
)
def test_a_verdict_is_right_or_not(fault: Fault | None, status: int, reasons: tuple[str, ...], right: bool) -> None:
    assert Verdict(fault, "gguf Q8_0", status, reasons, 1.0).right == right


def test_the_tables_are_markdown() -> None:
    low = next(fault for fault in FAULTS if fault.parts)
    reasons = tuple(f"model.layers.2.{part}.weight: d" for part in low.parts)
    verdicts = [
        Verdict(None, "gguf Q8_0", 0, (), 1.0),
        Verdict(None, "gguf F16", 0, (), 1.0),
        Verdict(None, "gguf Q8_0, untied", 3, ("a", "b"), 1.0),
        Verdict(FAULTS[1], "gguf Q8_0", 3, ("<|a|>", "b"), 1.0),
        Verdict(FAULTS[0], "gguf Q8_0", 0, (), 1.0),
        Verdict(FAULTS[0], "gguf F16", 3, ("c is 9% off, column 5 of row 2 the most; F16 leaves 1%",), 1.0),
        Verdict(low, "gguf Q8_0", 3, (reasons[0], "e"), 1.0),
        Verdict(low, "gguf F16", 3, reasons, 1.0),
        Verdict(low, "gptq gptq-int4-g128", 0, (), 1.0),
    ]
    assert tables(verdicts).splitlines() == [
        "| fault | gguf Q8_0 | gguf F16 | gptq gptq-int4-g128 | by what |",
        "| --- | --- | --- | --- | --- |",
        f"| {FAULTS[0].name} | **missed** | caught |  | c is 9% off, F16 leaves 1% |",
        f"| {FAULTS[1].name} | caught |  |  | \\<\\|a\\|> |",
        f"| {low.name} | **caught in part (1)** | caught | **missed** | {reasons[0]} |",
        "",
        "| sound artifacts | passed | wrongly failed |",
        "| --- | --- | --- |",
        "| gguf | Q8_0 F16 |  |",
        "| gguf, untied |  | Q8_0: a; b |",
    ]


def test_results_are_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [Verdict(None, "gguf Q8_0", 0, (), 1.0), Verdict(FAULTS[0], "gguf Q8_0", 3, ("a",), 2.0)]
    assert [Verdict.from_json(one.as_json()) for one in verdicts] == verdicts
    # A case that was run twice counts as it was found last.
    assert report([Verdict(FAULTS[0], "gguf Q8_0", 0, (), 1.0), *verdicts]) == 0
    assert capsys.readouterr().out == f"{tables(verdicts)}\n\n2 artifacts, 0 judged wrongly\n"
    assert report([Verdict(FAULTS[0], "gguf Q8_0", 0, (), 1.0)]) == 1


@pytest.mark.slow
def test_faults_are_caught_and_sound_artifacts_pass(demo: Path, tmp_path: Path) -> None:
    """One of each kind: the adapter, the weights, the configuration, the tokenizer, what comes after the encoder. Sound
    artifacts are scored, and what the files of the others show is enough."""
    names = [
        "adapter left out", "eight rows of noise", "norm epsilon wrong", "two neighbouring merges exchanged",
        "flipped after encoding",
    ]  # fmt: skip
    ran = subprocess.run(
        [
            sys.executable, "-m", "scripts.sabotage.sabotage", "--base", str(demo / "base"),
            "--adapter", str(demo / "adapter"), "--work", str(tmp_path / "work"), "--formats", "gguf", "safetensors",
            "--types", "Q4_K_M", "bf16", "--only", *names, "--fast", "--json", str(tmp_path / "found.json"),
        ],
        cwd=CHECKOUT, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    types = ("gguf Q4_K_M", "safetensors bf16")
    faults = [fault for fault in FAULTS if any(name in fault.name for name in names)]
    expected: list[tuple[str | None, str]] = [(None, type_) for type_ in types]
    expected += [(fault.name, type_) for type_ in types for fault in faults if fault.fits(*type_.split())]
    assert [(one["fault"], one["type"]) for one in found] == expected
    assert all(one["reasons"] for one in found if one["fault"])
    assert not any((tmp_path / "work").iterdir())
