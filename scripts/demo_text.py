"""The demo's text: the topics of Python's built-in help, cut into passages and split in four without overlap."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

Passage = tuple[str, str]


@dataclass(frozen=True)
class DemoText:
    """Passages as (topic, text).

    Attributes:
        base: what the base is trained on.
        base_held_out: passages of the same topics that it never sees.
        adapter: what the adapter is trained on, as questions and answers; other topics than the base's.
        adapter_held_out: passages of those topics that it never sees.
    """

    base: list[Passage]
    base_held_out: list[Passage]
    adapter: list[Passage]
    adapter_held_out: list[Passage]


def split_topics(adapter_characters: int = 75_000, passage_characters: int = 500) -> DemoText:
    """Split deterministically; a paragraph that stands in several topics is kept once, so that no part leaks."""
    passages = _passages(passage_characters)
    names = sorted(passages)
    random.Random(1).shuffle(names)
    adapter_names: set[str] = set()
    taken = 0
    for name in names:
        length = sum(len(text) for text in passages[name])
        if taken < adapter_characters and length < 20_000:
            adapter_names.add(name)
            taken += length
    base = [(name, text) for name in sorted(passages) if name not in adapter_names for text in passages[name]]
    adapter = [(name, text) for name in sorted(adapter_names) for text in passages[name]]
    base_train, base_held_out = _hold_out(base, 0.1, seed=2)
    adapter_train, adapter_held_out = _hold_out(adapter, 0.15, seed=3)
    return DemoText(base_train, base_held_out, adapter_train, adapter_held_out)


def _passages(size: int) -> dict[str, list[str]]:
    """Topics as passages of about `size` characters."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name in sorted(topics):
        current: list[str] = []
        for paragraph in re.split(r"\n\n+", topics[name].strip("\n")):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            current.append(paragraph)
            if sum(map(len, current)) >= size:
                found.setdefault(name, []).append("\n\n".join(current))
                current = []
        if current:
            found.setdefault(name, []).append("\n\n".join(current))
    return found


def _hold_out(passages: list[Passage], share: float, seed: int) -> tuple[list[Passage], list[Passage]]:
    shuffled = list(passages)
    random.Random(seed).shuffle(shuffled)
    count = int(len(shuffled) * share)
    return shuffled[count:], shuffled[:count]
