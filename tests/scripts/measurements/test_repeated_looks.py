"""scripts/measurements/repeated_looks.py: the stated rates, by the project's own intervals and verdicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.recipe import Evaluation
from scripts.measurements import repeated_looks

TRIALS = 6000


def test_the_looks_are_those_of_the_default_numbers_of_tokens() -> None:
    evaluation = Evaluation()
    first, most = (tokens // evaluation.n_ctx for tokens in (evaluation.tokens, evaluation.max_tokens))
    assert repeated_looks.looks(first, most) == (8, 16, 32)
    assert repeated_looks.looks(8, 40) == (8, 16, 32, 40)
    assert repeated_looks.looks(8, 8) == (8,)


MEASURED = repeated_looks.resampled([1.0, 2.0, 3.0, 10.0])
DRAWS = {"normal": repeated_looks.normal, "log-normal": repeated_looks.log_normal(0.3), "measured": MEASURED}


@pytest.mark.parametrize(
    ("draw", "spread"), list(zip(DRAWS.values(), (0.2, 0.3, 35.36), strict=True)), ids=DRAWS.keys()
)
def test_windows_have_the_limit_for_their_mean(draw: repeated_looks.Draw, spread: float) -> None:
    means = draw(np.random.default_rng(0), 200_000)
    assert means.shape == (200_000, 1)
    assert means.mean() == pytest.approx(repeated_looks.LIMIT, rel=0.005, abs=0.03 if draw is MEASURED else 0)
    assert means.std() / repeated_looks.LIMIT == pytest.approx(spread, rel=0.02)


def test_a_figure_that_must_be_at_least_its_limit_is_mirrored() -> None:
    drawn = repeated_looks.resampled([0.0, 1.0, 5.0], mirrored=True)(np.random.default_rng(0), 50)
    assert {round(float(value - repeated_looks.LIMIT), 9) for value in drawn[:, 0]} == {2, 1, -3}


def stated(name: str) -> tuple[float, float]:
    """What docs/measurements has of means of that kind: shares that passed by the first look and by the last."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "measurements" / "intervals.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} | ") and line.count("%") >= 6)
    cells = [cell.strip() for cell in row[1:-1].split("|")]
    once, thrice = (float(cells[number].removesuffix(" %")) / 100 for number in (1, 3))
    return once, thrice


# One look is meant to let 2.5 % past, and three let past about twice as many; more yet where windows are skewed,
# because the upper end of the interval is then too low.
@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (repeated_looks.normal, "normal"),
        (repeated_looks.log_normal(0.28), "log-normal, 28 %"),
        (repeated_looks.log_normal(0.45), "log-normal, 45 %"),
    ],
    ids=["normal", "log-normal, 28 %", "log-normal, 45 %"],
)
def test_three_looks_let_a_figure_at_its_limit_past_as_often_as_is_stated(draw: repeated_looks.Draw, name: str) -> None:
    once, thrice = stated(name)
    assert 0.024 < once < 0.07
    assert 0.055 < thrice < 0.13
    found = repeated_looks.simulate(draw, (8, 16, 32), TRIALS, seed=1)
    # Three standard errors of a share of so many trials.
    for rate, expected in ((found.passed[0], once), (found.passed[-1], thrice)):
        assert rate == pytest.approx(expected, abs=3 * (expected * (1 - expected) / TRIALS) ** 0.5)
    assert list(found.passed) == sorted(found.passed)
    assert sum((found.passed[-1], found.failed[-1])) < 0.16
