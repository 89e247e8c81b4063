"""Places in a manifest, and numbers as text. On the page, each number names its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Format = Callable[[float], str]
# As wide as a plus sign.
MINUS = "\N{MINUS SIGN}"
NOTHING = Markup('<span class="none">\N{EN DASH}</span>')
_MOST_DECIMALS = 8
# The most decimals of a tick. With more, an exponent is shorter.
_MOST_TICK_DECIMALS = 4


@dataclass(frozen=True)
class Node:
    """A place in the manifest.

    Attributes:
        value: the value there; None if there is nothing.
        pointer: the place as a JSON pointer (RFC 6901).
    """

    value: Any
    pointer: str = ""

    def __getitem__(self, key: str | int) -> Node:
        found = None
        if isinstance(self.value, dict):
            found = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int):
            found = self.value[key]
        return Node(found, f"{self.pointer}/{str(key).replace('~', '~0').replace('/', '~1')}")

    def __iter__(self) -> Iterator[Node]:
        return (self[index] for index in range(len(self.value or ())))

    def __bool__(self) -> bool:
        return bool(self.value)

    def entries(self) -> Iterator[tuple[str, Node]]:
        """The keys of an object and the places there."""
        return ((key, self[key]) for key in self.value or {})


@dataclass(frozen=True)
class Unit:
    """The form of numbers of one kind.

    Attributes:
        factor: they are multiplied by this.
        suffix: the text after them.
        signed: whether they have a plus sign.
    """

    factor: float = 1.0
    suffix: str = ""
    signed: bool = False

    def text(self, value: float, decimals: int | None = None) -> str:
        """Write a number, with three digits unless decimals are given."""
        scaled = self.factor * value
        if decimals is None:
            decimals = _decimals(scaled, 3)
        # An exponent says more than 300 digits do.
        form = ".2e" if abs(scaled) >= 1e9 else f".{decimals}f"
        # Write no negative zero: the number only rounds to zero.
        return f"{scaled:{'+' if self.signed else ''}z{form}}".replace("-", MINUS) + self.suffix

    def fixed(self, spread: float, digits: int = 2) -> Format:
        """Writes numbers with the decimals that show so many digits of `spread`. Two digits of an error are enough."""
        decimals = _decimals(self.factor * spread, digits)
        return lambda value: self.text(value, decimals)

    def short(self, value: float, digits: int = 6) -> str:
        """Write a round number, such as a tick or a limit, with no more digits than it has."""
        return f"{self.factor * value:.{digits}g}".replace("-", MINUS) + self.suffix

    def apart(self, values: Sequence[float]) -> list[str]:
        """Write numbers in even steps, such as ticks, with the decimals of a step. So no two look alike."""
        step = values[1] - values[0] if len(values) > 1 else values[0]
        decimals = _decimals(self.factor * step, 1)
        short = [self.short(value) for value in values]
        if decimals > _MOST_TICK_DECIMALS and len({*short}) == len(short):
            return short
        return [self.text(value, decimals) for value in values]

    def limit(self, value: float) -> str:
        """Write a limit. Four digits are enough for a computed one."""
        return self.short(value, 4)


NATS = Unit()
PERCENT = Unit(100, "%")
CHANGE = Unit(100, "%", signed=True)


def _decimals(value: float, digits: int) -> int:
    if not value or not math.isfinite(value):
        return 0
    return min(_MOST_DECIMALS, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def count(value: float) -> str:
    """Write a number of things."""
    return f"{value:,.0f}"


def shown(node: Node, as_text: Format) -> Markup:
    """A number and its place; a dash if there is none."""
    if node.value is None:
        return NOTHING
    text = '<data value="{}" data-at="{}">{}</data>'
    return Markup(text).format(json.dumps(node.value), node.pointer, as_text(node.value))


def counted(node: Node) -> Markup:
    """The number of things at a place."""
    length = len(node.value or ())
    return Markup('<data value="{}" data-length-of="{}">{}</data>').format(length, node.pointer, count(length))


def share(part: Node, whole: Node) -> Markup:
    """A number as a share of another, with the places of both; a dash if there is none."""
    if part.value is None or not whole.value:
        return NOTHING
    taken = part.value / whole.value
    if not math.isfinite(taken):
        return NOTHING
    text = '<data value="{}" data-part-at="{}" data-whole-at="{}">{}</data>'
    return Markup(text).format(json.dumps(taken), part.pointer, whole.pointer, PERCENT.text(taken, 0))
