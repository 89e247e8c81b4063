"""Our metrics against those of llama-perplexity --kl-divergence, on one pair of files and the same windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from exporter.recipe import Calibration, Evaluation
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.tokens.embedded import embedded_text
from exporter.tokens.windows import Windows, make_windows
from exporter.verify.scores.divergence import Divergence
from exporter.verify.scores.metrics import Comparison, compare
from tests.exports import export_to
from tests.merged import merged_model
from tests.oracles import tools
from tests.predictions import log_softmax, reference_of

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float64]
WINDOWS = 8
# Below this log-probability of the reference, llama-perplexity leaves a token out of its sum.
FLOOR = -16.0
# What float32 costs it: its log-probabilities are single numbers of up to 16, and its logits may differ from ours in
# the last bits, since the two libraries are compiled apart.
FLOAT32 = 4e-6


@dataclass
class Pair:
    """Both judgements of Q4_K_M against F32, and what is needed to say how far they may be apart.

    Attributes:
        theirs: what llama-perplexity prints.
        ours: our comparison.
        kl: our divergences by position, shape (windows, scored).
        p, q: log-probabilities of all tokens in both files, shape (windows, scored, vocabulary).
        right: ids of the right tokens, shape (windows, scored).
        error: the most that a log-probability of the reference is off by in their file, shape (windows, scored).
        lowest: the lowest log-probability that the file can hold at a position, same shape.
    """

    theirs: dict[str, float]
    ours: Comparison
    kl: Floats
    p: Floats
    q: Floats
    right: npt.NDArray[np.int64]
    error: Floats
    lowest: Floats


def stored(file: Path, windows: Windows) -> tuple[Floats, Floats]:
    """Step and lowest value of the log-probabilities that llama-perplexity saved, by position.

    After 8 bytes of magic come n_ctx, vocabulary and number of windows as int32, the tokens as int32, and for each
    position float32 step and lowest value and a uint16 for each token, padded to an even number
    (tools/perplexity/perplexity.cpp, log_softmax).
    """
    raw = file.read_bytes()
    n_ctx, vocabulary, count = np.frombuffer(raw, np.int32, 3, 8)
    assert (n_ctx, count) == (windows.n_ctx, len(windows.ids))
    tokens = np.frombuffer(raw, np.int32, n_ctx * count, 20)
    assert (tokens.reshape(count, n_ctx) == np.array(windows.ids)).all()
    width = 2 * ((vocabulary + 1) // 2) + 4
    rows = np.frombuffer(raw, np.uint16, offset=20 + 4 * n_ctx * count).reshape(count, windows.scored, width)
    heads = np.ascontiguousarray(rows[:, :, :4]).view(np.float32).astype(np.float64)
    return heads[:, :, 0], heads[:, :, 1]


@pytest.fixture(scope="module")
def pair(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("divergence")
    export_to(
        folder / "out", demo / "base", demo / "adapter", format="gguf", quant=("F32", "Q4_K_M"), name="model"
    )  # fmt: skip
    text = folder / "text.txt"
    text.write_text(embedded_text()[:30_000], encoding="utf-8")
    full, quantized = (folder / "out" / f"model-{quant}.gguf" for quant in ("F32", "Q4_K_M"))
    theirs = tools.kl_divergence(full, quantized, text, folder / "logits", WINDOWS)
    tokenizer = merged_model(demo / "base", demo / "adapter").tokenizer
    windows = make_windows(Calibration(text=text), Evaluation(tokens=WINDOWS * 512, n_ctx=512), tokenizer)
    assert len(windows.ids) == WINDOWS
    logits: dict[Path, list[npt.NDArray[np.float32]]] = {full: [], quantized: []}
    for file, kept in logits.items():
        LlamaCpp().score(file, windows, lambda _: None, lambda _, given, kept=kept: kept.append(given.numpy().copy()))  # type: ignore[misc]
    reference = reference_of(np.stack(logits[full]), windows)
    divergence = Divergence(reference)
    scores = LlamaCpp().score(quantized, windows, lambda _: None, divergence.take)
    found = divergence.found(scores)
    assert found.kl is not None
    step, lowest = stored(folder / "logits", windows)
    return Pair(
        theirs,
        compare(scores, reference.scores, found),
        found.kl,
        log_softmax(np.stack(logits[full])),
        log_softmax(np.stack(logits[quantized])),
        np.array(windows.ids)[:, windows.first_scored + 1 :],
        step / 2 + FLOAT32,
        lowest,
    )


def divergence_bound(pair: Pair) -> Floats:
    """How far their divergence of a position may be from ours.

    They take p' = p exp(e) with |e| at most half a step for p, which changes p (ln p - ln q) by at most
    p ((exp(|e|) - 1) (|ln p - ln q| + |e|) + |e|), and leave out what is below the floor.
    """
    p, ratio, error = np.exp(pair.p), np.abs(pair.p - pair.q), pair.error[:, :, None]
    kept = p * (np.expm1(error) * (ratio + error) + error)
    return np.asarray(np.where(pair.p < FLOOR + error, np.maximum(p * ratio, kept), kept).sum(axis=2))


STATISTICS: dict[str, Any] = {
    "Mean KLD": np.mean,
    "Median KLD": np.median,
    "90.0% KLD": lambda values: np.quantile(values, 0.9),
    "95.0% KLD": lambda values: np.quantile(values, 0.95),
    "99.0% KLD": lambda values: np.quantile(values, 0.99),
    "Maximum KLD": np.max,
}
# Half of the last digit that is printed, and of the last one of a percentage.
PRINTED, PERCENT = 5.1e-7, 5.1e-6


@pytest.mark.parametrize("name", STATISTICS)
def test_divergences_are_llama_perplexity_s_within_its_16_bits(pair: Pair, name: str, record_property: Any) -> None:
    """Each of these figures can only grow with every value, so values off by a bound put it between two figures."""
    bound, figure = divergence_bound(pair), STATISTICS[name]
    low, high = figure(pair.kl - bound) - PRINTED, figure(pair.kl + bound) + PRINTED
    record_property("ours, theirs, allowed", (figure(pair.kl), pair.theirs[name], (low, high)))
    assert low <= pair.theirs[name] <= high


def test_ours_are_the_figures_of_these_values(pair: Pair) -> None:
    spread = pair.ours.divergence
    assert spread is not None
    ours = (spread.mean, spread.median, spread.p90, spread.p95, spread.p99, spread.largest)
    assert ours == pytest.approx([figure(pair.kl) for figure in STATISTICS.values()])


def test_the_mean_is_nearer_than_the_worst_rounding(pair: Pair, record_property: Any) -> None:
    """Roundings are as often up as down: uniform over a step, each token's by itself, so most of them cancel."""
    p, ratio = np.exp(pair.p), pair.p - pair.q
    step = 2 * pair.error[:, :, None]
    deviation = np.sqrt(((p * (1 + ratio) * step) ** 2 / 12).sum()) / pair.kl.size
    left_out = np.where(pair.p < FLOOR, p * np.abs(ratio), 0).sum() / pair.kl.size
    # Of second order in a step: exp(e) has the mean 1 + step² / 24.
    second = (p * (1 + np.abs(ratio)) * step**2).sum() / 12 / pair.kl.size
    allowed = 5 * deviation + left_out + second + PRINTED
    record_property("ours, theirs, allowed", (pair.kl.mean(), pair.theirs["Mean KLD"], allowed))
    assert abs(pair.theirs["Mean KLD"] - pair.kl.mean()) <= allowed


def test_perplexities_and_their_ratio_are_the_same(pair: Pair, record_property: Any) -> None:
    right = np.take_along_axis(pair.p, pair.right[:, :, None], axis=2)[:, :, 0]
    # What is too unlikely for the file is stored as the lowest it can hold.
    bound = float((pair.error + np.maximum(pair.lowest - right, 0)).mean())
    record_property("ln ratio: ours, theirs, allowed", (pair.ours.delta_log, pair.theirs[RATIO], bound))
    assert pair.theirs["Mean PPL(Q)"] == pytest.approx(pair.ours.perplexity, rel=3e-6)
    assert pair.theirs["Mean PPL(base)"] == pytest.approx(pair.ours.reference_perplexity, rel=np.expm1(bound))
    assert pair.theirs[RATIO] == pytest.approx(pair.ours.delta_log, abs=bound + PRINTED)
    assert pair.theirs["Mean PPL(Q)/PPL(base)"] == pytest.approx(1 + pair.ours.delta, abs=2 * bound + PRINTED)


RATIO = "Mean ln(PPL(Q)/PPL(base))"


def test_changes_of_the_right_token_s_probability_are_the_same(pair: Pair, record_property: Any) -> None:
    right = np.take_along_axis(pair.p, pair.right[:, :, None], axis=2)[:, :, 0]
    bound = np.exp(right) * np.expm1(pair.error) + np.exp(np.maximum(pair.lowest, right)) - np.exp(right)
    ours = pair.ours.probability_change.value, pair.ours.probability_rms.value
    theirs = pair.theirs["Mean Δp"] / 100, pair.theirs["RMS Δp"] / 100
    allowed = bound.mean() + PERCENT, np.sqrt((bound**2).mean()) + PERCENT
    record_property("mean and RMS: ours, theirs, allowed", (ours, theirs, allowed))
    assert abs(theirs[0] - ours[0]) <= allowed[0]
    # Root mean squares differ by at most the root mean square of the differences.
    assert abs(theirs[1] - ours[1]) <= allowed[1]


def test_the_share_of_the_same_top_token_is_the_same(pair: Pair, record_property: Any) -> None:
    """But where their 16 bits cannot tell the two likeliest tokens apart."""
    highest = np.sort(pair.p, axis=2)[:, :, -2:]
    tied = (highest[:, :, 1] - highest[:, :, 0] <= 2 * pair.error).mean()
    theirs = pair.theirs["Same top p"] / 100
    record_property("ours, theirs, allowed", (pair.ours.same_top, theirs, tied))
    assert abs(theirs - pair.ours.same_top) <= tied + PERCENT
