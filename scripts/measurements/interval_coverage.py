"""How often the 95 % intervals of real windows hold the mean: scores once, then draws again and again.

    python -m scripts.measurements.interval_coverage --base .cache/demo/base --adapter .cache/demo/adapter FILE.gguf \\
        [--windows 160]

The windows are those of the embedded text that an export would score, but more of them. Their mean over all is taken
for the truth. The script draws 8, 16 and 32 windows with replacement, so that draws are independent. It counts how
often each of three intervals holds the truth: one that takes every position for an independent draw, one by windows
with the normal quantile, and that of `exporter.verify.scores.intervals`. For the last it also counts how often it lies
wholly below and above.

It counts runs of windows that follow each other in the text too. Their text is alike, so their intervals hold the mean
of the whole text less often.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exporter.adapters.adapter import Adapter
from exporter.inputs.checkpoint import Checkpoint
from exporter.merge.device import resolve_device
from exporter.merge.model import plan_merge
from exporter.recipe import Calibration, Evaluation, Execution
from exporter.reference.predictions import score_reference
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.tokens.windows import make_windows
from exporter.verify.scores.divergence import Divergence
from exporter.verify.scores.intervals import clustered_stderr, interval
from exporter.verify.scores.metrics import Floats
from scripts.measurements.divergence import silent
from scripts.tables import table, write_json

NORMAL = 1.959964
RUN = 8


@dataclass(frozen=True)
class Coverage:
    """Shares of draws in which an interval holds the mean of all windows.

    Attributes:
        positions: by independent positions.
        normal: by windows, with the normal quantile.
        used: by `interval`.
        below: in which the whole of the last is below that mean.
        above: in which it is above.
    """

    positions: float
    normal: float
    used: float
    below: float
    above: float


def coverage(draws: Iterable[Floats], truth: float) -> Coverage:
    """Count over draws, each of shape (windows, scored) with at least two windows."""
    counts = np.zeros(5)
    number = 0
    for number, values in enumerate(draws, 1):  # noqa: B007
        mean, stderr = float(values.mean()), clustered_stderr(values)
        if stderr is None:
            raise ValueError("one window has no interval")
        low, high = interval(mean, stderr, len(values))
        by_position = float(values.std(ddof=1)) / math.sqrt(values.size)
        off = abs(mean - truth)
        counts += (off <= NORMAL * by_position, off <= NORMAL * stderr, low <= truth <= high, high < truth, low > truth)
    return Coverage(*map(float, counts / number))


def drawn(values: Floats, windows: int, draws: int, seed: int) -> Iterable[Floats]:
    """So many windows with replacement, again and again."""
    generator = np.random.default_rng((seed, windows))
    for _ in range(draws):
        yield values[generator.integers(0, len(values), windows)]


def neighbours(values: Floats, run: int = RUN) -> Iterable[Floats]:
    """Every run of so many windows that follow each other."""
    for first in range(len(values) - run + 1):
        yield values[first : first + run]


def unlike(values: Floats) -> tuple[float, float]:
    """How windows differ: the standard deviation of their means, and how much more these vary than the means of as
    many independent positions would; NaN where all positions are the same."""
    means, variance = values.mean(axis=1), float(values.var(ddof=1))
    times = float(means.var(ddof=1)) * values.shape[1] / variance if variance else math.nan
    return float(means.std(ddof=1)), times


def score(base: Path, adapter: Path | None, file: Path, windows: int) -> dict[str, Floats]:
    """The figures of a GGUF file against the trained model by position, each of shape (windows, scored)."""
    adapters = (Adapter.open(adapter),) if adapter else ()
    model = plan_merge(Checkpoint.open(base), adapters, "model")
    evaluation = Evaluation(tokens=windows * Evaluation().n_ctx)
    cut = make_windows(Calibration(), evaluation, model.tokenizer)
    threads = Execution().workers
    reference = score_reference(model, cut, resolve_device("cpu"), threads=threads)
    torch.set_num_threads(threads)
    divergence = Divergence(reference)
    scores = LlamaCpp().score(file, cut, silent, divergence.take)
    kl = divergence.found(scores).kl
    if kl is None:
        raise ValueError(f"llama.cpp gave no whole predictions of {file}")
    return {
        "change of log-perplexity": reference.scores.log_probabilities - scores.log_probabilities,
        "KL divergence": kl,
        "same top token": (scores.top_tokens == reference.scores.top_tokens).astype(np.float64),
    }


def tables(figures: Mapping[str, Floats], counts: Iterable[int], draws: int, seed: int) -> str:
    """How unlike windows are, coverage by figure and number of windows, and that of neighbours."""
    spreads, rows, runs = [], [], []
    for name, values in figures.items():
        truth = float(values.mean())
        deviation, times = unlike(values)
        share = f"{deviation / truth:.0%}" if name == "KL divergence" else "-"
        spreads.append([name, f"{truth:.6f}", f"{deviation:.6f}", share, f"{times:.2f}"])
        for count in counts:
            found = coverage(drawn(values, count, draws, seed), truth)
            rows.append([name, str(count), *(f"{value:.1%}" for value in vars(found).values())])
        runs.append([name, f"{coverage(neighbours(values), truth).used:.1%}"])
    parts = [
        table(["figure", "mean", "deviation of windows", "of the mean", "times independent"], spreads),
        table(["figure", "windows", "by positions", "normal", "as used", "wholly below", "wholly above"], rows),
        table([f"figure, runs of {RUN} neighbours", "as used"], runs),
    ]
    return "\n\n".join(parts)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--drawn", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="means of the windows, by figure")
    args = parser.parse_args()
    figures = score(args.base, args.adapter, args.file, args.windows)
    print(f"{len(next(iter(figures.values())))} windows, {args.draws} draws\n")
    print(tables(figures, args.drawn, args.draws, args.seed))
    write_json(args.json, {name: values.mean(axis=1).tolist() for name, values in figures.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
