"""scripts/measurements/interval_coverage.py: how draws are counted, on windows whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.verify.scores.metrics import Floats
from scripts.measurements import interval_coverage


def two_windows(low: float, high: float) -> Floats:
    return np.array([[low, low], [high, high]])


def test_draws_are_counted_by_hand() -> None:
    # Of two windows that are 2 apart: error 1, so the interval reaches 12.7 to both sides, the normal one 1.96, and one
    # by positions 1.96 / sqrt(3).
    draws = [two_windows(center - 1, center + 1) for center in (1.0, 1.5, -5.0, -20.0, 20.0, 30.0)]
    found = interval_coverage.coverage(draws, 0.0)
    assert found == interval_coverage.Coverage(*(count / 6 for count in (1, 2, 3, 1, 2)))


def test_one_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="one window"):
        interval_coverage.coverage([np.ones((1, 4))], 1.0)


def test_runs_of_neighbours_are_all_that_there_are() -> None:
    values = np.arange(10, dtype=np.float64).reshape(5, 2)
    runs = list(interval_coverage.neighbours(values, 3))
    assert [run[:, 0].tolist() for run in runs] == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]


def test_windows_of_independent_positions_are_no_more_unlike_than_that() -> None:
    generator = np.random.default_rng(0)
    independent = generator.normal(size=(4000, 50))
    assert interval_coverage.unlike(independent)[1] == pytest.approx(1, abs=0.07)
    # As much again in common: the mean of 50 positions has a variance of 1 + 1/50, of which 2 / 50 would be theirs.
    common = independent + generator.normal(size=(4000, 1))
    deviation, times = interval_coverage.unlike(common)
    assert deviation == pytest.approx(1.02**0.5, rel=0.04)
    assert times == pytest.approx(1.02 / (2 / 50), rel=0.05)


def test_the_table_shows_every_figure_and_number_of_windows() -> None:
    generator = np.random.default_rng(0)
    values = {"KL divergence": generator.gamma(2.0, 0.01, (30, 20)), "same top token": np.ones((30, 20))}
    shown = interval_coverage.tables(values, (4, 8), 200, 0)
    rows = [line.split() for line in shown.splitlines() if line.startswith("KL divergence ")]
    assert [row[2] for row in rows[1:3]] == ["4", "8"]
    assert all(0.85 < float(row[5].rstrip("%")) / 100 <= 1 for row in rows[1:3])
    # Windows that do not differ: every interval is the mean itself.
    assert shown.splitlines()[-1].split() == ["same", "top", "token", "100.0%"]
