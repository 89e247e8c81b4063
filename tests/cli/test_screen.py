"""The verdict table: every figure whole at the width of no terminal, and the top-k form labelled as such."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from exporter.cli.consoles import PLAIN_WIDTH
from exporter.cli.screen import Screen
from exporter.cli.verdict_table import show_table
from exporter.runtimes.base import TokenScores
from exporter.tokens.windows import Windows
from exporter.verify.gate import judge, not_scored
from exporter.verify.scores.metrics import Divergences, compare
from tests.default_gates import DEFAULT_GATES

LABEL = "gptqmodel gptq-int4-g128"


def table(windows: int, divergences: Divergences | None) -> str:
    generator = np.random.default_rng(0)
    tops = np.zeros((windows, 9), np.int64)
    reference = -generator.gamma(1.0, 2.0, tops.shape)
    artifact = reference - generator.normal(0.05, 0.01, tops.shape)
    comparison = compare(TokenScores(artifact, tops), TokenScores(reference, tops), divergences)
    out = io.StringIO()
    verdict = judge("vllm 1", comparison, DEFAULT_GATES[LABEL])
    show_table(Console(file=out, width=PLAIN_WIDTH), {LABEL: verdict}, {LABEL: 12_345_678_901})
    assert "…" not in out.getvalue().replace(" … ", "")
    return out.getvalue()


@pytest.mark.parametrize(
    ("divergences", "shown"),
    [
        (Divergences(kl=np.full((4, 9), 0.125)), " 0.12500 "),
        (Divergences(top_k=np.full((4, 9), 0.125), k=20), " top 20: ≥ 0.12500 "),
        (None, " - "),
    ],
    ids=["full", "top-k", "none"],
)
def test_a_row_shows_the_divergence_that_there_is(divergences: Divergences | None, shown: str) -> None:
    found = table(4, divergences)
    assert shown in found
    assert found.count(" … ") == 1


def test_one_window_shows_no_interval() -> None:
    assert " … " not in table(1, None)


def test_what_could_not_be_scored_has_a_row_and_a_reason() -> None:
    out = io.StringIO()
    reason = "it in vllm: found no end of [brackets]; expected one"
    verdict = not_scored("vllm 1", reason, DEFAULT_GATES[LABEL])
    show_table(Console(file=out, width=PLAIN_WIDTH), {LABEL: verdict}, {LABEL: 12_345_678_901})
    header, row, told = out.getvalue().splitlines()
    assert header.split()[:3] == ["artifact", "size", "perplexity"]
    assert row.split() == [*LABEL.split(), "12.35", "GB", "not", "scored", *"-------", "failed"]
    assert told.strip() == f"{LABEL}: {reason}"


@pytest.mark.parametrize("live", [False, True])
def test_what_begins_ends_what_came_before(live: bool) -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=PLAIN_WIDTH, force_terminal=live))
    windows = Windows(((0,) * 9,) * 3, 9, "made", "0" * 64)
    screen.doing("weights of it")
    screen.walking(windows)
    screen.layer(2, 2)
    screen.scoring("it", windows)
    screen.walking(windows)
    screen.stop()
    steps = ("weights of it", "walking reference, 3 windows", "scoring it")
    if live:
        # Of two bars at once, rich would draw the one that was left behind for ever.
        assert [out.getvalue().count("\x1b[?25h")] == [4]
    else:
        lines = out.getvalue().splitlines()
        assert [line.partition(":")[0] for line in lines] == list(steps)
        assert "2 layers in" in lines[1]
        assert "3 windows in" in lines[2]
