"""What an artifact's answers are worth: the faults in them, and what is reported without being one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.runtimes.base import Continuation
from exporter.verify.answers.ask import Asked
from exporter.verify.answers.question import Question

if TYPE_CHECKING:
    from exporter.verify.answers.follow import Followed


# Nats a token by which a continuation may fall short of what the reference would have chosen; docs/measurements has the
# measurements that it rests on.
MAX_SHORTFALL = 1.5
# A continuation that ends after a token or two is no mean: so many tokens are counted at least.
_FEWEST = 8
# A loop: the end of a continuation repeats at most so many tokens, over at least so many.
_LONGEST_PERIOD = 4
_LOOPING = 16


@dataclass(frozen=True)
class Answers:
    """An artifact's answers, judged.

    Attributes:
        asked: what it answered.
        followed: what the reference says along each continuation, by the prompt's name; an empty one has none.
        question: what it was asked.
        faults: what is wrong, in words; empty if nothing is.
    """

    asked: Asked
    followed: Mapping[str, Followed]
    question: Question
    faults: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        asked, prompts = self.asked, {prompt.name: prompt for prompt in self.question.prompts}
        return {
            "tokenization": {
                "texts": asked.texts,
                "differing": list(asked.differing),
                "explained": dict(asked.explained),
            },
            "chat_template": {"conversations": asked.conversations, "differing": list(asked.rendered_otherwise)}
            if asked.conversations
            else None,
            "stop": {
                "sources": self.question.stops.as_json(),
                "end_of_turn": asked.end_of_turn,
                "stops": asked.stops,
                "evidence": asked.stop_evidence,
                "ignored": list(asked.ignored),
            },
            "continuations": [
                _continuation_json(name, len(prompts[name].ids), found, self.followed.get(name))
                for name, found in asked.continuations.items()
            ],
            "max_shortfall": MAX_SHORTFALL,
            "broken": list(self.faults),
        }

    def summary(self) -> str:
        """One line for the screen."""
        asked = self.asked
        same = asked.texts - len(asked.differing) - len(asked.explained)
        parts = [f"{same} of {asked.texts} texts tokenized alike"]
        if asked.explained:
            parts[0] += f" ({len(asked.explained)} explained)"
        if asked.conversations:
            rendered = asked.conversations - len(asked.rendered_otherwise)
            parts.append(f"{rendered} of {asked.conversations} conversations rendered alike")
        if asked.stops is not None:
            parts.append(f"{'stops' if asked.stops else 'does not stop'} on {asked.end_of_turn}")
        first = ", ".join(
            f"{name} {_divergence_words(followed, len(asked.continuations[name].tokens))}"
            for name, followed in self.followed.items()
        )
        return ", ".join(parts) + (f"; first divergence: {first}" if first else "")


def _divergence_words(followed: Followed, tokens: int) -> str:
    at = followed.first_divergence
    if at is not None:
        return str(at)
    return "never" if len(followed.shortfall) == tokens else f"not before {len(followed.shortfall)}"


def _continuation_json(name: str, length: int, found: Continuation, followed: Followed | None) -> dict[str, Any]:
    first = followed.first_divergence if followed else None
    return {
        "prompt": name,
        "prompt_tokens": length,
        "tokens": len(found.tokens),
        "followed": len(followed.shortfall) if followed else 0,
        "stopped": found.stopped,
        "loop": loop_of(found.tokens)[0] or None,
        "diverges_at": first,
        "margin": float(followed.margin[first]) if followed and first is not None else None,
        "mean_shortfall": float(followed.shortfall.mean()) if followed else None,
        "largest_shortfall": float(followed.shortfall.max()) if followed else None,
    }


def judge_answers(asked: Asked, question: Question, followed: Mapping[str, Followed]) -> Answers:
    """Find the faults.

    Args:
        asked: what an artifact answered.
        question: what it was asked.
        followed: what the reference says along each of its continuations, by the prompt's name.
    """
    faults = []
    if asked.differing:
        faults.append(
            f"tokenization differs on {len(asked.differing)} of {asked.texts} texts: {_some(asked.differing)}"
        )
    if asked.rendered_otherwise:
        faults.append(
            f"the chat template renders {len(asked.rendered_otherwise)} of {asked.conversations} conversations "
            f"otherwise: {_some(asked.rendered_otherwise)}"
        )
    if asked.stops is False:
        faults.append(f"an answer does not stop on the token that ends a turn, {asked.end_of_turn}")
    for name, found in asked.continuations.items():
        if not found.tokens:
            faults.append(f"no token follows the {name} prompt")
            continue
        fault = _continuation_fault(found, asked, followed[name])
        if fault is not None:
            faults.append(f"after the {name} prompt, {fault}")
    return Answers(asked, followed, question, tuple(faults))


def _continuation_fault(found: Continuation, asked: Asked, followed: Followed) -> str | None:
    if asked.end_of_turn in found.tokens[:-1]:
        return f"it goes on after the token that ends a turn, {asked.end_of_turn}"
    period, start = loop_of(found.tokens)
    if period:
        # A reference that is led into a loop may well go on with it: what it says of the way in counts too. What is not
        # known of a continuation is taken for its choice, so that nothing fails by a beginning that the whole clears.
        inside = followed.shortfall[start:]
        known = len(followed.shortfall) == len(found.tokens)
        agreed = float((inside == 0).mean()) if known else 1.0
        entry = float(inside[: 2 * period].sum()) / min(2 * period, len(found.tokens) - start)
        if agreed < 0.5 or entry > MAX_SHORTFALL:
            what = "one token" if period == 1 else f"{period} tokens"
            return f"it repeats {what} over and over, where the reference would not"
    mean = float(followed.shortfall.sum()) / max(len(followed.shortfall), _FEWEST)
    if not np.isfinite(mean) or mean > MAX_SHORTFALL:
        return (
            f"its tokens are {mean:.2f} nats less likely than the reference's choice, the limit is {MAX_SHORTFALL:.2f}"
        )
    return None


def loop_of(tokens: Sequence[int]) -> tuple[int, int]:
    """The shortest period that the end of a continuation repeats, and where that begins; (0, length) if none does."""
    for period in range(1, _LONGEST_PERIOD + 1):
        start = len(tokens) - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - max(start, 0) >= _LOOPING:
            return period, start
    return 0, len(tokens)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
