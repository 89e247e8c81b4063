"""How often an artifact whose figure is exactly at its limit gets past it, because the figures are looked at again.

    python -m scripts.measurements.repeated_looks [--trials 40000] [--spreads 0.21 0.28 0.45] [--most 32] [--means FILE]

Simulates what `exporter.verify.candidates` does: as many windows again as were scored are drawn while the verdict is
undecided, up to the default number of evaluation tokens. The means of windows are drawn here, normal and log-normal
around the limit; intervals and verdicts are those of `exporter.verify.scores.intervals` and `exporter.verify.gate`. A
normal figure has the same rates whatever its spread is. The spreads of a log-normal one are those of the means of
windows, as shares of their mean. `interval_coverage` prints the demo's. An error over 8 windows in the tables of
`quality` is a spread over the root of 8. `--means` takes a file that `interval_coverage` wrote with `--json`: real
means of windows are then drawn too, with replacement, moved so that their mean is the limit.

Each row says how often the artifact had passed, and had failed, by each look. A single look is meant to let 2.5 %
past.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.recipe import Evaluation
from exporter.verify.gate import Check
from exporter.verify.scores.intervals import clustered_stderr, interval
from exporter.verify.scores.metrics import Floats
from scripts.tables import table

LIMIT = 0.1
# Of a normal figure: any does.
NORMAL_SPREAD = 0.2

# Means of so many windows, shape (windows, 1), whose own mean is `LIMIT`.
Draw = Callable[[np.random.Generator, int], Floats]


@dataclass(frozen=True)
class Rates:
    """Shares of artifacts by look, each counting those of the looks before it.

    Attributes:
        windows: that had been scored.
        passed: got past the limit.
        failed: were refused.
    """

    windows: tuple[int, ...]
    passed: tuple[float, ...]
    failed: tuple[float, ...]


def looks(first: int, most: int) -> tuple[int, ...]:
    """Numbers of windows at which the figures are looked at: as many again each time, and at last all there may be."""
    found = [first]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return tuple(found)


def normal(generator: np.random.Generator, windows: int) -> Floats:
    """A `Draw` of normal means."""
    return np.asarray(LIMIT * (1 + NORMAL_SPREAD * generator.standard_normal((windows, 1))))


def log_normal(spread: float) -> Draw:
    """A `Draw` of log-normal means, whose standard deviation is that share of their mean."""
    deviation = math.sqrt(math.log1p(spread**2))

    def draw(generator: np.random.Generator, windows: int) -> Floats:
        return np.asarray(LIMIT * np.exp(deviation * generator.standard_normal((windows, 1)) - deviation**2 / 2))

    return draw


def resampled(means: Sequence[float], *, mirrored: bool = False) -> Draw:
    """A `Draw` of means that were measured, moved to the limit.

    Args:
        means: of windows.
        mirrored: whether the figure must be at least its limit, and not at most: judged alike once its sign is
            changed.
    """
    values = np.asarray(means, dtype=np.float64)
    moved = LIMIT + (-1 if mirrored else 1) * (values - values.mean())

    def draw(generator: np.random.Generator, windows: int) -> Floats:
        return np.asarray(moved[generator.integers(0, len(moved), (windows, 1))])

    return draw


def verdict(values: Floats) -> str:
    """The gate's verdict on a figure that may be at most its limit."""
    mean, stderr = float(values.mean()), clustered_stderr(values)
    ends = None if stderr is None else interval(mean, stderr, len(values))
    return Check("kl_divergence", mean, ends, LIMIT, "at_most").verdict


def simulate(draw: Draw, at: Sequence[int], trials: int, seed: int = 0) -> Rates:
    """Judge so many artifacts that are exactly at their limit.

    Args:
        draw: where the means of their windows come from.
        at: numbers of windows at which the figure is looked at.
        trials: artifacts.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    counts = {"passed": np.zeros(len(at)), "failed": np.zeros(len(at)), "undecided": np.zeros(len(at))}
    for _ in range(trials):
        values = draw(generator, at[-1])
        for look, windows in enumerate(at):
            found = verdict(values[:windows])
            if found != "undecided":
                counts[found][look:] += 1
                break
    passed, failed = (tuple((counts[name] / trials).tolist()) for name in ("passed", "failed"))
    return Rates(tuple(at), passed, failed)


def main() -> int:
    """The command line."""
    evaluation = Evaluation()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40_000)
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.21, 0.28, 0.45])
    parser.add_argument("--means", type=Path, metavar="FILE", help="measured means of windows, by figure")
    parser.add_argument("--most", type=int, default=evaluation.max_tokens // evaluation.n_ctx, help="windows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    at = looks(evaluation.tokens // evaluation.n_ctx, args.most)
    draws = {"normal": normal} | {f"log-normal, {spread:.0%}": log_normal(spread) for spread in args.spreads}
    for name, means in (json.loads(args.means.read_text(encoding="utf-8")) if args.means else {}).items():
        draws[f"measured: {name}"] = resampled(means, mirrored=name == "same top token")
    rows = []
    for name, draw in draws.items():
        found = simulate(draw, at, args.trials, args.seed)
        rows.append([name, *(f"{value:.1%}" for value in (*found.passed, *found.failed))])
    print(f"{args.trials} artifacts whose figure is exactly at its limit; passed and failed by each look\n")
    titles = [f"{name} by {windows}" for name in ("passed", "failed") for windows in at]
    print(table(["means of windows", *titles], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
