"""Places in a manifest, and numbers as text. On the page, a number says where it is from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Format = Callable[[float], str]
# As wide as a plus.
MINUS = "\N{MINUS SIGN}"
NOTHING = Markup('<span class="none">\N{EN DASH}</span>')
_MOST_DECIMALS = 8
# Of ticks: an exponent is shorter.
_MOST_TICK_DECIMALS = 4


@dataclass(frozen=True)
class Node:
    """A place in the manifest.

    Attributes:
        value: what is there; None where there is nothing.
        pointer: where it is, as a JSON pointer (RFC 6901).
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
        """Of an object: its keys, and what is there."""
        return ((key, self[key]) for key in self.value or {})


@dataclass(frozen=True)
class Unit:
    """How numbers of one kind are written.

    Attributes:
        factor: what they are multiplied with.
        suffix: what follows them.
        signed: whether a plus is written.
    """

    factor: float = 1.0
    suffix: str = ""
    signed: bool = False

    def text(self, value: float, decimals: int | None = None) -> str:
        """A number; with three digits unless decimals are given."""
        scaled = self.factor * value
        if decimals is None:
            decimals = _decimals(scaled, 3)
        # Of what overflowed, the exponent says more than 300 digits.
        form = ".2e" if abs(scaled) >= 1e9 else f".{decimals}f"
        # No zero is negative: what rounds to it lies on either side.
        return f"{scaled:{'+' if self.signed else ''}z{form}}".replace("-", MINUS) + self.suffix

    def fixed(self, spread: float, digits: int = 2) -> Format:
        """Writes numbers with as many decimals as show so many digits of `spread`: of an error, two are enough."""
        decimals = _decimals(self.factor * spread, digits)
        return lambda value: self.text(value, decimals)

    def short(self, value: float, digits: int = 6) -> str:
        """A round number, such as a tick or a limit, with no more digits than it has."""
        return f"{self.factor * value:.{digits}g}".replace("-", MINUS) + self.suffix

    def apart(self, values: Sequence[float]) -> list[str]:
        """Numbers in even steps, such as ticks, all with the decimals of a step: no two are written alike."""
        step = values[1] - values[0] if len(values) > 1 else values[0]
        decimals = _decimals(self.factor * step, 1)
        short = [self.short(value) for value in values]
        if decimals > _MOST_TICK_DECIMALS and len({*short}) == len(short):
            return short
        return [self.text(value, decimals) for value in values]

    def limit(self, value: float) -> str:
        """A limit; four digits are enough of one that was computed."""
        return self.short(value, 4)


NATS = Unit()
PERCENT = Unit(100, "%")
CHANGE = Unit(100, "%", signed=True)


def _decimals(value: float, digits: int) -> int:
    if not value or not math.isfinite(value):
        return 0
    return min(_MOST_DECIMALS, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def count(value: float) -> str:
    """A number of things."""
    return f"{value:,.0f}"


def shown(node: Node, as_text: Format) -> Markup:
    """A number and where it is from; a dash where there is none."""
    if node.value is None:
        return NOTHING
    text = '<data value="{}" data-at="{}">{}</data>'
    return Markup(text).format(json.dumps(node.value), node.pointer, as_text(node.value))


def counted(node: Node) -> Markup:
    """How many things there are at a place."""
    length = len(node.value or ())
    return Markup('<data value="{}" data-length-of="{}">{}</data>').format(length, node.pointer, count(length))


def share(part: Node, whole: Node) -> Markup:
    """A number as a share of another, and where both are from; a dash where there is none."""
    if part.value is None or not whole.value:
        return NOTHING
    taken = part.value / whole.value
    if not math.isfinite(taken):
        return NOTHING
    text = '<data value="{}" data-part-at="{}" data-whole-at="{}">{}</data>'
    return Markup(text).format(json.dumps(taken), part.pointer, whole.pointer, PERCENT.text(taken, 0))
