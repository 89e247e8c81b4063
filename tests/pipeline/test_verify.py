"""Verification within an export: each artifact in its own runtime, and what happens when the gate fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from exporter import Execution, export
from exporter.errors import ExporterError, RuntimeScoreError
from exporter.plan.gate_limits import Gate
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration, Evaluation
from exporter.reference.predictions import score_reference, walk_reference
from exporter.runtimes.base import OnLogits, OnWindow, Runtime, TokenScores, TopK, TopKScores
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.runtimes.transformers.runtime import Transformers
from exporter.tokens.windows import Windows, make_windows
from exporter.verify.candidates import Candidate, judge_candidates
from exporter.verify.gate import Verification
from exporter.verify.scores.metrics import compare
from exporter.verify.scores.score import score_in
from tests.exports import export_to, recipe
from tests.folders import copy, edit_json, edit_tensors, listing
from tests.merged import merged_model
from tests.predictions import reference_of, top_of

# A short text, so that tokenizing it takes no time: this file.
TEXT: dict[str, Any] = {"text": Path(__file__), "tokens": 128, "window": 64}
EVALUATION: dict[str, Any] = {"tokens": 128, "n_ctx": 64, "answers": False}


class Recorder(Reporter):
    """Notes what is scored, and how many windows."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.windows = 0

    def scoring(self, title: str, windows: Windows) -> None:
        self.titles.append(title)

    def window(self, count: int) -> None:
        self.windows += count


def test_each_artifact_is_scored_in_its_own_runtime_against_one_reference(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("qwen3")
    adapter = make_adapter(base)
    values = {"verify": True, "calibration": TEXT, "evaluation": EVALUATION, "name": "model"}
    gguf = recipe(base, (adapter,), tmp_path / "gguf", format="gguf", quant=("F32", "F16"), **values)
    hf = recipe(base, (adapter,), tmp_path / "hf", quant=("fp32",), **values).outputs[0]
    recorder = Recorder()
    result = export(gguf.model_copy(update={"outputs": (*gguf.outputs, hf)}), Execution(device="cpu"), recorder)
    assert recorder.titles == [
        "gguf F32 in llamacpp", "gguf F16 in llamacpp", "safetensors fp32 in transformers",
    ]  # fmt: skip
    assert recorder.windows == 3 * 2
    assert result.passed
    model = merged_model(base, adapter)
    windows = make_windows(Calibration(**TEXT), Evaluation(**EVALUATION), model.tokenizer)
    reference = score_reference(model, windows, "cpu").scores
    for folder, label, scores in (
        (
            result.folders[0],
            "gguf F32",
            LlamaCpp().score(tmp_path / "gguf" / "model-F32.gguf", windows, lambda _: None),
        ),
        (result.folders[1], "safetensors fp32", Transformers().score(tmp_path / "hf", windows, lambda _: None)),
    ):
        comparison = folder.verdicts[label].comparison
        assert comparison is not None
        assert comparison.delta_log == pytest.approx(compare(scores, reference).delta_log, abs=1e-6)
        assert comparison.tokens_scored == 62


def test_a_failed_gate_leaves_nothing_at_the_output(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2", hidden=256, intermediate=512, head_dim=64)
    result = export_to(
        tmp_path / "out", base, format="gguf", quant=("Q2_K", "F32"), name="model", verify=True,
        calibration=TEXT, evaluation=EVALUATION | {"gate": {"Q2_K": {"kl": 0.0}}},
    )  # fmt: skip
    folder = result.folders[0]
    assert not result.passed
    assert not folder.published
    assert folder.path == tmp_path / "out.rejected"
    assert listing(tmp_path) == {"out.rejected"} | {
        f"out.rejected/{name}"
        for name in (
            "export.json",
            "README.md",
            "report.html",
            "model-Q2_K.gguf",
            "model-F32.gguf",
            "model.imatrix.gguf",
            "Modelfile.Q2_K",
            "Modelfile.F32",
        )
    }
    verdicts = {a["quant"]: a["verification"]["verdict"] for a in folder.manifest["artifacts"]}
    assert verdicts == {"Q2_K": "failed", "F32": "passed"}
    assert folder.manifest["artifacts"][0]["verification"]["broken"]


@pytest.mark.parametrize(("format_", "quant"), [("gguf", "F32"), ("safetensors", "fp32")])
def test_a_model_whose_scores_are_not_finite_is_not_published(
    make_base: Callable[..., Path], tmp_path: Path, format_: str, quant: str
) -> None:
    """Finite weights may still overflow in the forward pass; that must not end in a traceback, nor in a pass."""
    base = copy(make_base("qwen2", tied=False), tmp_path / "base")
    edit_json(base / "config.json", dtype="float32")

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].float()
        tensors["model.norm.weight"].fill_(3e38)
        tensors["lm_head.weight"].mul_(100)

    edit_tensors(base / "model.safetensors", blow_up)
    with suppress(ExporterError):
        values: dict[str, Any] = {"calibration": TEXT, "evaluation": EVALUATION}
        result = export_to(tmp_path / "out", base, format=format_, quant=(quant,), verify=True, **values)
        assert not result.passed
    assert not (tmp_path / "out").exists()


@dataclass
class Given(Runtime):
    """A runtime that has these scores of every artifact, and these logits, if any."""

    scores: TokenScores
    logits: torch.Tensor | None = None
    name: ClassVar[str] = "given"

    def version(self) -> str:
        return "given 1"

    def score(
        self, artifact: Path, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None
    ) -> TokenScores:
        for number in range(len(windows.ids)):
            if on_logits is not None and self.logits is not None:
                on_logits(number, self.logits[number])
        return self.scores


LOGITS = np.random.default_rng(0).standard_normal((2, 9, 24)).astype(np.float32)
REFERENCE = reference_of(LOGITS)


def compare_given(runtime: Given) -> Any:
    return score_in(runtime, Path("model"), "gguf Q8_0", REFERENCE, Reporter()).compare()


def test_whole_predictions_have_every_divergence_but_the_top_k_form() -> None:
    found = compare_given(Given(REFERENCE.scores, torch.from_numpy(LOGITS)))
    assert (found.divergence.largest, found.jensen_shannon.largest) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert found.top_k_divergence is None


def test_the_likeliest_tokens_have_the_top_k_form_alone() -> None:
    given = top_of(2 * LOGITS, 5)
    found = compare_given(Given(TopKScores(REFERENCE.scores.log_probabilities, given.ids[:, :, 0], given)))
    assert found.divergence is found.jensen_shannon is None
    assert found.top_k_divergence.k == 5
    assert found.top_k_divergence.mean > 0.01


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_an_error_with_the_artifact_s_name(value: float) -> None:
    """The right tokens may all have finite scores where another token's logit has none."""
    spoilt = torch.from_numpy(LOGITS.copy())
    spoilt[1, 3, 7] = value
    with pytest.raises(RuntimeScoreError, match="gguf Q8_0 in given"):
        compare_given(Given(REFERENCE.scores, spoilt))


def test_a_log_probability_of_the_top_k_that_is_no_number_is_an_error() -> None:
    given = top_of(LOGITS, 5)
    spoilt = given.log_probabilities.copy()
    spoilt[0, 2, 4] = np.nan
    scores = TopKScores(REFERENCE.scores.log_probabilities, given.ids[:, :, 0], TopK(given.ids, spoilt))
    with pytest.raises(RuntimeScoreError, match="gguf Q8_0 in given"):
        compare_given(Given(scores))


# --- more tokens while undecided -----------------------------------------------------------------------------------


class Seeded(Runtime):
    """A runtime whose right tokens are as much less likely than the reference's as its windows' first token says."""

    name = "seeded"

    def __init__(self) -> None:
        self.scored: list[int] = []

    def version(self) -> str:
        return "seeded 1"

    def score(
        self, artifact: Path, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None
    ) -> TokenScores:
        self.scored.append(len(windows.ids))
        shift = np.array([[ids[0] / 100] for ids in windows.ids])
        reference = reference_of(LOGITS[:1].repeat(len(windows.ids), axis=0), windows).scores
        return TokenScores(reference.log_probabilities - shift, reference.top_tokens)


def windows_starting(*firsts: int) -> Any:
    """A reference on windows of 18 tokens, the first of which is given."""
    ids = tuple((first, *(0,) * 18) for first in firsts)
    return reference_of(LOGITS[:1].repeat(len(firsts), axis=0), Windows(ids, 19, "made", "0" * 64))


class Supply:
    """Further windows, until there are none."""

    def __init__(self, *firsts: int) -> None:
        self.left, self.asked = list(firsts), list[int]()

    def draw(self, windows: int) -> Any:
        self.asked.append(windows)
        taken, self.left = self.left[:windows], self.left[windows:]
        return windows_starting(*taken) if taken else None


def judged(gate: Gate, first: tuple[int, ...], supply: Supply) -> tuple[Verification, Seeded]:
    runtime = Seeded()
    candidate = Candidate("made", "made", Path("model"), runtime, gate, None)
    (found,) = judge_candidates([candidate], [None], windows_starting(*first), supply, Reporter())
    return found, runtime


def test_a_clear_verdict_draws_no_more_tokens() -> None:
    for gate, verdict in ((Gate(0.5, 0.5), "passed"), (Gate(0.001, 0.5), "failed")):
        found, runtime = judged(gate, (1, 2, 1, 2), Supply(1, 2, 1, 2))
        assert (found.verdict, runtime.scored, found.looks) == (verdict, [4], (36,))


def test_what_is_undecided_is_scored_on_as_many_windows_again_until_it_is_clear() -> None:
    # Means of 1 and 2 %, about a limit of 2 %: the interval of two windows is far wider than that of eight.
    supply = Supply(*[1, 2] * 20)
    found, runtime = judged(Gate(0.02, 0.5), (1, 2), supply)
    assert found.verdict == "passed"
    assert runtime.scored[:2] == [2, 2]
    assert supply.asked == runtime.scored[1:]
    assert found.looks == tuple(9 * sum(runtime.scored[:count]) for count in range(1, len(runtime.scored) + 1))
    assert found.comparison is not None
    assert found.comparison.tokens_scored == found.looks[-1]
    assert found.comparison.delta == pytest.approx(np.expm1(0.015))


def test_what_stays_undecided_does_not_pass() -> None:
    found, runtime = judged(Gate(0.015, 0.5), (1, 2), Supply(1, 2, 1, 2))
    assert (found.verdict, found.passed) == ("undecided", False)
    assert runtime.scored == [2, 2, 2]
    assert "undecided" in found.broken[0]


def test_one_window_is_never_enough() -> None:
    found, runtime = judged(Gate(0.5, 0.5), (1,), Supply())
    assert (found.verdict, runtime.scored) == ("undecided", [1])
    found, runtime = judged(Gate(0.5, 0.5), (1,), Supply(1))
    assert (found.verdict, runtime.scored) == ("passed", [1, 1])


@pytest.mark.parametrize("spills", [False, True])
def test_an_export_draws_windows_that_nothing_was_calibrated_on(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spills: bool
) -> None:
    base = make_base("qwen2", hidden=256, intermediate=512, head_dim=64)
    folders: list[Path | None] = []
    walk = walk_reference

    def walked(*arguments: Any, **options: Any) -> Any:
        folders.append(options["scratch"])
        return walk(*arguments, **options)

    monkeypatch.setattr("exporter.reference.further_tokens.walk_reference", walked)
    if spills:
        monkeypatch.setattr("exporter.reference.further_tokens.states_budget", lambda: 0)
    result = export_to(
        tmp_path / "out", base, format="gguf", quant=("Q2_K", "F32"), name="model", verify=True, calibration=TEXT,
        # No interval ends at its figure, so this limit stays undecided.
        evaluation=EVALUATION | {"gate": {"Q2_K": 0.0, "F32": 1.0}, "max_tokens": 512},
    )  # fmt: skip
    manifest = result.folders[0].manifest
    found = {a["quant"]: a["verification"] for a in manifest["artifacts"]}
    assert found["F32"]["looks"] == [62]
    assert found["Q2_K"]["looks"] == [62, 124, 248]
    assert found["Q2_K"]["tokens_scored"] == 248
    assert manifest["evaluation"]["tokens_scored"] == 62
    assert manifest["evaluation"]["drawn"]["windows"] == 6
    assert not result.passed
    assert len(folders) == 2
    for folder in folders:
        # Beside the files of the export, and gone.
        assert (folder is not None) == spills
        assert folder is None or (folder.is_relative_to(tmp_path) and not folder.exists())
