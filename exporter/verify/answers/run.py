"""Asks every artifact of a run, walks once along what they answered, and adds the faults to the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.errors import RuntimeScoreError
from exporter.model import MergedModel
from exporter.plan import ExportPlan, FolderPlan
from exporter.reporter import Reporter
from exporter.runtimes.base import Answering, Runtime, load_runtime
from exporter.verify.answers.ask import Asked, ask
from exporter.verify.answers.judge import Answers, judge_answers
from exporter.verify.answers.source import Question, Tokenizers, make_question
from exporter.verify.gate import Verification
from exporter.verify.unscored import is_of_the_run, unscored_reason


@dataclass(frozen=True)
class Served:
    """One artifact to be asked.

    Attributes:
        label: its name, for messages.
        entry: what the runtime loads.
        runtime: what serves it.
    """

    label: str
    entry: Path
    runtime: Runtime


def answers_of(
    model: MergedModel,
    served: Sequence[Served | None],
    device: str,
    reporter: Reporter,
    *,
    threads: int = 1,
    compute_dtype: str = "float32",
) -> list[Answers | str | None]:
    """Ask artifacts and judge what they answer, in their order.

    Args:
        model: the merged model that all of them are made from.
        served: the artifacts; None for one that is not to be asked, because it could not even be scored.
        device: where the reference's layers compute.
        reporter: told about every artifact and layer.
        threads: threads of the reference's walk on the CPU.
        compute_dtype: what the walk computes in, `float32` or `bfloat16`.

    Returns:
        The answers; or why there are none, in words, by a fault of the artifact's (see `exporter.verify.unscored`);
        None for one that was not asked, or whose runtime does nothing but score.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    if not any(served):
        return [None] * len(served)
    tokenizers = Tokenizers(model.tokenizer)
    question = make_question(model, tokenizers)
    asked = [None if one is None else _asked(one, question, tokenizers, reporter) for one in served]
    prompts = {prompt.name: prompt.ids for prompt in question.prompts}
    wanted = {
        (number, name): (prompts[name], found.tokens)
        for number, one in enumerate(asked)
        if isinstance(one, Asked)
        for name, found in one.continuations.items()
        if found.tokens
    }
    if not wanted:
        reporter.scored()
        return [judge_answers(one, question, {}) if isinstance(one, Asked) else one for one in asked]
    import torch

    from exporter.verify.answers.follow import follow

    reporter.doing("reference along the answers")
    followed = follow(
        model,
        list(wanted.values()),
        device,
        threads=threads,
        dtype=getattr(torch, compute_dtype),
        on_layer=reporter.layer,
    )
    reporter.scored()
    return [
        judge_answers(
            one,
            question,
            {name: followed[wanted[number, name]] for name in one.continuations if (number, name) in wanted},
        )
        if isinstance(one, Asked)
        else one
        for number, one in enumerate(asked)
    ]


def _asked(one: Served, question: Question, tokenizers: Tokenizers, reporter: Reporter) -> Asked | str | None:
    """What an artifact answers; why it does not, by its own fault; None if its runtime does nothing but score."""
    if not isinstance(one.runtime, Answering):
        return None
    reporter.doing(f"answers of {one.label} in {one.runtime.name}")
    try:
        with one.runtime.session(one.entry, question.n_ctx) as session:
            return ask(session, question, tokenizers)
    except RuntimeScoreError as error:
        if is_of_the_run(error):
            raise
        return unscored_reason(error, "no answers", one.runtime.name, one.entry)


def answer_artifacts(
    plan: ExportPlan,
    staged: Sequence[tuple[FolderPlan, Path]],
    verdicts: Sequence[Mapping[str, Verification]],
    device: str,
    reporter: Reporter,
) -> list[dict[str, Verification]]:
    """The verdicts on a run's artifacts with their answers, and with the faults in those among what is broken.

    Args:
        plan: the run's plan.
        staged: every output folder with the place where its files are now.
        verdicts: for each of them, the verification of each artifact by label.
        device: where transformers and the reference compute.
        reporter: told about every artifact and layer.

    Raises:
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    served = [
        Served(
            artifact.label,
            files if artifact.entry == "." else files / artifact.entry,
            load_runtime(folder.runtimes[artifact.label], device, plan.execution.endpoint),
        )
        if found[artifact.label].comparison
        else None
        for (folder, files), found in zip(staged, verdicts, strict=True)
        for artifact in folder.artifacts
    ]
    answers = iter(
        answers_of(plan.model, served, device, reporter, threads=plan.threads, compute_dtype=plan.recipe.compute_dtype)
    )
    return [
        {artifact.label: with_answers(found[artifact.label], next(answers)) for artifact in folder.artifacts}
        for (folder, _), found in zip(staged, verdicts, strict=True)
    ]


def with_answers(verification: Verification, answers: Answers | str | None) -> Verification:
    """A verdict with an artifact's answers, or with why there are none."""
    if isinstance(answers, str):
        return replace(verification, not_answered=answers)
    return replace(verification, answers=answers)
