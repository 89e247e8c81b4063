"""The demo's text: the topics of Python's built-in help, cut into passages and split in four without overlap."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

Passage = tuple[str, str]

PASSAGE_CHARACTERS = 500
ADAPTER_CHARACTERS = 75_000
# The few long topics stay with the base: one of them would be the adapter's whole text.
LONGEST_ADAPTER_TOPIC = 20_000
BASE_HELD_OUT, ADAPTER_HELD_OUT = 0.10, 0.15


@dataclass(frozen=True)
class DemoText:
    """Passages as (topic, text), shuffled.

    Attributes:
        base: what the base is trained on.
        base_held_out: passages of the same topics that it never sees.
        adapter: what the adapter is trained on, as questions and answers; other topics than the base's.
        adapter_held_out: passages of those topics that neither ever sees.
    """

    base: tuple[Passage, ...]
    base_held_out: tuple[Passage, ...]
    adapter: tuple[Passage, ...]
    adapter_held_out: tuple[Passage, ...]


def split_topics() -> DemoText:
    """Split this Python's help; the same Python gives the same split."""
    passages = _passages()
    names = sorted(passages)
    random.Random(1).shuffle(names)
    adapter_names: set[str] = set()
    taken = 0
    for name in names:
        length = sum(len(text) for text in passages[name])
        if taken < ADAPTER_CHARACTERS and length < LONGEST_ADAPTER_TOPIC:
            adapter_names.add(name)
            taken += length
    base = [(name, text) for name in sorted(passages) if name not in adapter_names for text in passages[name]]
    adapter = [(name, text) for name in sorted(adapter_names) for text in passages[name]]
    base_train, base_held_out = _hold_out(base, BASE_HELD_OUT, seed=2)
    adapter_train, adapter_held_out = _hold_out(adapter, ADAPTER_HELD_OUT, seed=3)
    return DemoText(base_train, base_held_out, adapter_train, adapter_held_out)


def _passages() -> dict[str, list[str]]:
    """Topics as passages of whole paragraphs; one that stands in several topics is kept once, so that no part leaks."""
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
            if sum(map(len, current)) >= PASSAGE_CHARACTERS:
                found.setdefault(name, []).append("\n\n".join(current))
                current = []
        if current:
            found.setdefault(name, []).append("\n\n".join(current))
    return found


def _hold_out(passages: list[Passage], share: float, seed: int) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
    shuffled = list(passages)
    random.Random(seed).shuffle(shuffled)
    count = int(len(shuffled) * share)
    return tuple(shuffled[count:]), tuple(shuffled[:count])
