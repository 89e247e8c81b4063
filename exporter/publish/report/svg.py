"""SVG elements, scales and ticks. Colours are classes of the page's style sheet, which has two colour schemes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping

from markupsafe import Markup, escape

from exporter.publish.report.nodes import Node

Scale = Callable[[float], float]
# Two ticks do not show where a third value is between them.
_LEAST_TICKS = 3


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Make an element. Text and attributes are escaped; `class_` and `font_size` become `class` and `font-size`.

    Args:
        name: the element's.
        children: text, or elements as `Markup`.
        attributes: those that are None are left out; numbers are rounded to a hundredth of a pixel.
    """
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
        if value is not None
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), join(parts), join(map(escape, children)))


def join(parts: Iterable[str]) -> Markup:
    """Join elements in order."""
    return Markup("").join(parts)


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(content: str, x: float, y: float, class_: str | None = None, anchor: str | None = None) -> Markup:
    """Text at a point: its base line starts, ends or has its middle there (`anchor`)."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def mark(name: str, node: Node, title: str, /, **attributes: str | float | None) -> Markup:
    """An element that stands for a number. It carries the number and its place in the manifest."""
    places: Mapping[str, str] = {"data_at": node.pointer, "data_value": json.dumps(node.value)}
    return tag(name, tag("title", title), **attributes, **places)


def drawing(width: float, height: float, label: str, parts: Iterable[str]) -> Markup:
    """A whole drawing, as wide as its place. Screen readers read `label` in its place."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", join(parts), viewBox=box, width=width, height=height, role="img", aria_label=label)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """A scale from values to pixels."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """A scale from the logarithms of positive values to pixels. A value below `low` is drawn at `low`."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(max(value, low)))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at least three: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: the lower end.
        high: the upper end.
        most: the most steps between them; there are more only if that leaves fewer than three numbers.
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    # Try steps from the widest on, down to one that has three multiples in any range.
    found = [_multiples(factor * power, low, high) for factor in (20, 10, 5, 2, 1, 0.5)]
    enough = [numbers for numbers in found if len(numbers) >= _LEAST_TICKS]
    fitting = [numbers for numbers in enough if len(numbers) <= most + 1]
    return fitting[-1] if fitting else enough[0]


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
