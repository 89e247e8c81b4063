"""Asks every artifact of a run, walks once along what they answered, and adds the faults to the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from exporter.errors import RuntimeScoreError
from exporter.merge.model import MergedModel
from exporter.plan.reporter import Reporter
from exporter.runtimes.base import Runtime
from exporter.tokens.prompts import Prompt, Tokenizers
from exporter.verify.answers.ask import Asked, ask
from exporter.verify.answers.judge import Answers, judge_answers
from exporter.verify.answers.question import Question, make_question
from exporter.verify.scores.not_scored import is_of_the_run, unscored_reason

if TYPE_CHECKING:
    from exporter.reference.predictions import Reference
    from exporter.verify.answers.follow import Followed


Tokens = tuple[int, ...]


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


class TrainedModel(Protocol):
    """The trained model, as far as it is here, for what it says of answers."""

    @property
    def model(self) -> MergedModel:
        """What its files say. Of a reference pack, without weights."""

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        """What artifacts go on with; None for what its tokenizer makes of the usual ones."""

    def follow(
        self, wanted: Sequence[tuple[Tokens, Tokens]], reporter: Reporter
    ) -> Mapping[tuple[Tokens, Tokens], Followed]:
        """What it says along continuations.

        Args:
            wanted: prompts with their continuations, none of them empty.
            reporter: told about every layer.
        """


@dataclass(frozen=True)
class WalkedModel:
    """Base and adapters, which are walked through; see `TrainedModel`.

    Attributes:
        model: the merged model.
        device: where layers compute.
        threads: threads of the walk on the CPU.
        compute_dtype: what the walk computes in, `float32` or `bfloat16`.
    """

    model: MergedModel
    device: str
    threads: int = 1
    compute_dtype: str = "float32"

    @property
    def prompts(self) -> None:
        """See `TrainedModel`."""

    def follow(
        self, wanted: Sequence[tuple[Tokens, Tokens]], reporter: Reporter
    ) -> Mapping[tuple[Tokens, Tokens], Followed]:
        """See `TrainedModel`."""
        import torch

        from exporter.verify.answers.follow import follow

        reporter.doing("reference along the answers")
        dtype = getattr(torch, self.compute_dtype)
        return follow(self.model, wanted, self.device, threads=self.threads, dtype=dtype, on_layer=reporter.layer)


@dataclass(frozen=True)
class PackedReference:
    """A reference pack, which knows the first token that follows each prompt; see `TrainedModel`.

    Attributes:
        model: the merged model, without weights.
        prompts: what artifacts go on with.
        reference: has the states of their last tokens, and the head.
    """

    model: MergedModel
    prompts: tuple[Prompt, ...]
    reference: Reference

    def follow(
        self, wanted: Sequence[tuple[Tokens, Tokens]], reporter: Reporter
    ) -> Mapping[tuple[Tokens, Tokens], Followed]:
        """See `TrainedModel`."""
        del reporter
        from exporter.verify.answers.follow import follow_first

        if self.reference.prompts is None:
            return {}
        ids = [prompt.ids for prompt in self.prompts]
        return follow_first(self.reference.head, self.reference.prompts, ids, wanted)


def answers_of(
    trained: TrainedModel, served: Sequence[Served | None], reporter: Reporter
) -> list[Answers | str | None]:
    """Ask artifacts and judge what they answer, in their order.

    Args:
        trained: the trained model that all of them are made from.
        served: the artifacts; None for one that is not to be asked, because it could not even be scored.
        reporter: told about every artifact and layer.

    Returns:
        The answers; or why there are none, in words, by a fault of the artifact's
        (see `exporter.verify.scores.not_scored`); None for one that was not asked, or whose runtime does nothing but
        score.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    if not any(served):
        return [None] * len(served)
    tokenizers = Tokenizers(trained.model.tokenizer)
    question = make_question(trained.model, tokenizers, trained.prompts)
    asked = [None if one is None else _asked(one, question, tokenizers, reporter) for one in served]
    prompts = {prompt.name: prompt.ids for prompt in question.prompts}
    wanted = {
        (number, name): (prompts[name], found.tokens)
        for number, one in enumerate(asked)
        if isinstance(one, Asked)
        for name, found in one.continuations.items()
        if found.tokens
    }
    followed = trained.follow(list(wanted.values()), reporter) if wanted else {}
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
    try:
        opening = one.runtime.session(one.entry, question.n_ctx)
        if opening is None:
            return None
        reporter.doing(f"answers of {one.label} in {one.runtime.name}")
        with opening as session:
            return ask(session, question, tokenizers)
    except RuntimeScoreError as error:
        if is_of_the_run(error):
            raise
        return unscored_reason(error, "no answers", one.runtime.name, one.entry)
