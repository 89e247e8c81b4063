"""scripts/repeated_looks.py: the rates that docs/quality.md states, by the project's own intervals and verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if str(SCRIPTS) not in sys.path:
    # The scripts import each other by plain names, as they do when they are run.
    sys.path.insert(0, str(SCRIPTS))

import repeated_looks  # noqa: E402

from exporter.recipe import Evaluation  # noqa: E402

TRIALS = 6000


def test_the_looks_are_those_of_the_default_numbers_of_tokens() -> None:
    evaluation = Evaluation()
    first, most = (tokens // evaluation.n_ctx for tokens in (evaluation.tokens, evaluation.max_tokens))
    assert repeated_looks.looks(first, most) == (8, 16, 32)
    assert repeated_looks.looks(8, 40) == (8, 16, 32, 40)
    assert repeated_looks.looks(8, 8) == (8,)


@pytest.mark.parametrize(("shape", "spread"), [("normal", 0.3), ("log-normal", 0.3)])
def test_windows_have_the_limit_for_their_mean(shape: repeated_looks.Shape, spread: float) -> None:
    means = repeated_looks.window_means(np.random.default_rng(0), shape, spread, 200_000)
    assert means.mean() == pytest.approx(repeated_looks.LIMIT, rel=0.005)
    assert means.std() / means.mean() == pytest.approx(spread, rel=0.02)


# What docs/quality.md states, of 40,000 artifacts: one look is meant to let 2.5 % past, and three let past more than
# twice as many; more yet where windows are skewed, because the upper end of the interval is then too low.
@pytest.mark.parametrize(
    ("shape", "spread", "once", "thrice"),
    [("normal", 0.2, 0.025, 0.058), ("log-normal", 0.28, 0.048, 0.097), ("log-normal", 0.45, 0.066, 0.125)],
)
def test_how_often_three_looks_let_a_figure_at_its_limit_past(
    shape: repeated_looks.Shape, spread: float, once: float, thrice: float
) -> None:
    found = repeated_looks.simulate(shape, spread, (8, 16, 32), TRIALS, seed=1)
    # Three standard errors of a share of so many trials.
    for rate, expected in ((found.passed[0], once), (found.passed[-1], thrice)):
        assert rate == pytest.approx(expected, abs=3 * (expected * (1 - expected) / TRIALS) ** 0.5)
    assert list(found.passed) == sorted(found.passed)
    assert sum((found.passed[-1], found.failed[-1])) < 0.16
