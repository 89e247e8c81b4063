"""Asks one artifact in its runtime, and holds what it answers against the source's tokenizer and chat template."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.errors import RuntimeScoreError
from exporter.runtimes.base import Continuation, Session
from exporter.tokens.prompts import MAX_NEW, Tokenizers
from exporter.verify.answers.question import Question

# Causes of a difference that lie in a runtime and in no file that it could be given.
UNNORMALIZED = "the runtime does not normalize text"
NORMALIZED = "the tokenizer's class in transformers normalizes text, and tokenizer.json does not"
TAKEN_FOR_SPECIAL = "the runtime takes ordinary tokens for ends of an answer"


@dataclass(frozen=True)
class Asked:
    """What one artifact answered.

    Attributes:
        texts: tokenizations compared; a text counts twice where the runtime has both ways of reading special tokens.
        differing: names of the texts that are tokenized otherwise, for no cause that is known.
        explained: names of the texts that are tokenized otherwise, with the cause.
        conversations: conversations compared.
        rendered_otherwise: names of those that the artifact renders otherwise, or refuses.
        continuations: by the prompt's name.
        end_of_turn: the token that ends a turn, None if no source names one.
        stops: whether the runtime stops on it; None without one.
        stop_evidence: see `Session`.
        ignored: further tokens that a source names, on which the runtime does not stop.
    """

    texts: int
    differing: tuple[str, ...]
    explained: Mapping[str, str]
    conversations: int
    rendered_otherwise: tuple[str, ...]
    continuations: Mapping[str, Continuation]
    end_of_turn: int | None
    stops: bool | None
    stop_evidence: str
    ignored: tuple[int, ...]


def ask(session: Session, question: Question, tokenizers: Tokenizers) -> Asked:
    """Ask everything.

    Args:
        session: the artifact in its runtime.
        question: what to ask.
        tokenizers: the source's tokenizer.

    Raises:
        RuntimeScoreError: the runtime cannot run the artifact.
    """
    texts, differing, explained = _compare_tokens(session, question, tokenizers)
    continuations = session.generate([prompt.ids for prompt in question.prompts], MAX_NEW)
    ending = question.stops.end_of_turn
    return Asked(
        texts=texts,
        differing=differing,
        explained=explained,
        conversations=len(question.conversations),
        rendered_otherwise=tuple(name for name in question.conversations if not _renders(session, question, name)),
        continuations={prompt.name: found for prompt, found in zip(question.prompts, continuations, strict=True)},
        end_of_turn=ending,
        stops=session.stops_on(ending) if ending is not None else None,
        stop_evidence=session.stop_evidence,
        ignored=tuple(token for token in question.stops.all if token != ending and not session.stops_on(token)),
    )


def _compare_tokens(
    session: Session, question: Question, tokenizers: Tokenizers
) -> tuple[int, tuple[str, ...], dict[str, str]]:
    count = 0
    differing: list[str] = []
    explained: dict[str, str] = {}
    for name, text in question.texts.items():
        for special in (True, False):
            found = session.tokenize(text, special=special)
            if found is None:
                continue
            count += 1
            if found == tokenizers.ids(text, special=special):
                continue
            label = name if special else f"{name} (special tokens as text)"
            cause = _cause(session, text, found, tokenizers, special=special)
            if cause is None:
                differing.append(label)
            else:
                explained[label] = cause
    return count, tuple(differing), explained


def _cause(session: Session, text: str, found: list[int], tokenizers: Tokenizers, *, special: bool) -> str | None:
    """Why a text is tokenized otherwise, if it is for what no file could change; None if not.

    llama.cpp reads no normalizer, and takes every token for special whose text is one of the ends that it knows
    (src/llama-vocab.cpp): `</s>`, an ordinary token of Qwen's. transformers makes a Qwen2Tokenizer that normalizes
    whatever its file says (models/qwen2/tokenization_qwen2.py), and vLLM takes it from there.
    """
    if found == tokenizers.ids(unicodedata.normalize("NFC", text), special=special):
        return NORMALIZED
    if found == tokenizers.ids(text, special=special, normalized=False):
        return UNNORMALIZED
    taken = session.stop_ids() or frozenset()
    if found == tokenizers.ids(text, special=special, normalized=False, more=taken):
        return TAKEN_FOR_SPECIAL
    return None


def _renders(session: Session, question: Question, name: str) -> bool:
    try:
        return session.render(question.conversations[name]) == question.rendered[name]
    except RuntimeScoreError:
        return False
