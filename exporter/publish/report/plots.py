"""The plots, each from places in the manifest. All are 360 wide, so that a phone shows their text unscaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.publish.report.figures import Figure
from exporter.publish.report.nodes import NATS, Format, Node, Unit, count
from exporter.publish.report.svg import drawing, linear, logarithmic, mark, tag, text, ticks

WIDTH = 360
# Plots with axes: the frame, which begins where the labels of its ticks end, and the width of a letter of a label.
_LEFT, _RIGHT, _TOP, _BASE, _HEIGHT = 46.0, 352.0, 10.0, 160.0, 196
_LETTER = 6.4
# Rows: the left and right end of their bars, and the height of each.
_BARS, _BARS_END, _ROW = 98.0, 282.0, 22
_LONGEST_LABEL = 14
# The least distance from the ideal to the end of a scale. A value closer than that is as good as ideal.
_LEAST_REACH = 1e-6
# A figure that is more times its limit than this has a bar that ends in an arrow.
_BEYOND = 3.0


@dataclass(frozen=True)
class Point:
    """A number with a name.

    Attributes:
        name: its layer, kind, type or position.
        value: the number; null if it is not finite.
        more: text after the number.
    """

    name: str
    value: Node
    more: str = ""

    @property
    def number(self) -> float | None:
        """The number."""
        return None if self.value.value is None else float(self.value.value)


# --- a figure against its limit --------------------------------------------------------------------------------------


def interval_bar(figure: Figure) -> Markup:
    """A figure and its interval over the range that its limit allows; 168 wide and 20 high."""
    value = float(figure.value.value)
    low, high = figure.ends or (value, value)
    first, last = _bar_range(figure, min(low, value), max(high, value))
    x = linear(first, last, 10, 158)

    def at(place: float) -> float:
        return x(min(max(place, first), last))

    def upright(place: float, half: float, class_: str) -> Markup:
        return tag("line", x1=x(place), x2=x(place), y1=10 - half, y2=10 + half, class_=class_)

    parts = [tag("line", x1=10, x2=158, y1=10, y2=10, class_="track")]
    if figure.limit is not None:
        start, end = map(at, figure.allowed)
        parts.append(tag("rect", x=start, y=3, width=max(end - start, 1), height=14, class_="allowed"))
        parts += [upright(limit, 9, "limit") for limit in figure.allowed if first <= limit <= last]
    if figure.kind == "within":
        parts.append(upright(figure.ideal, 7, "ideal"))
    look = f"mark {figure.verdict or 'plain'}"
    parts.append(tag("line", x1=at(low), x2=at(high), y1=10, y2=10, class_=f"{look} whisker"))
    parts += [upright(end, 4, f"{look} whisker") for end in (low, high) if first <= end <= last]
    title = f"{figure.name}: {figure.text(value)}"
    if first <= value <= last:
        parts.append(mark("circle", figure.value, title, cx=x(value), cy=10, r=3.5, class_=look))
    else:
        tip, back = (167, 159) if value > last else (1, 9)
        parts.append(mark("path", figure.value, title, d=f"M{tip} 10L{back} 5V15Z", class_=look))
    return drawing(168, 20, title, parts)


def _bar_range(figure: Figure, low: float, high: float) -> tuple[float, float]:
    """The values at the ends of a bar, far enough from the ideal to show limit and interval."""
    reach = max(abs(low - figure.ideal), abs(high - figure.ideal)) * 1.15 or 1e-9
    if figure.limit is not None:
        limit = max(abs(end - figure.ideal) for end in figure.allowed if math.isfinite(end))
        reach = max(1.3 * limit, min(reach, _BEYOND * limit or reach))
    first = figure.ideal if figure.kind == "at_most" else figure.ideal - reach
    last = figure.ideal if figure.kind == "at_least" else figure.ideal + reach
    return first, last


# --- rows ------------------------------------------------------------------------------------------------------------


def bars(label: str, points: Sequence[Point], as_text: Format) -> Markup:
    """One horizontal bar for each point, from zero, with its number at the end."""
    largest = max((point.number or 0.0 for point in points), default=0.0)
    x = linear(0, largest, _BARS, _BARS_END - (40 if any(point.more for point in points) else 0))

    def draw(point: Point, y: float) -> Markup:
        width = max(x(point.number or 0.0) - _BARS, 0.5)
        return mark("rect", point.value, _title(point, as_text), x=_BARS, y=y - 7, width=width, height=14, class_="bar")

    return _rows(label, points, as_text, [], draw)


def deviations(label: str, points: Sequence[Point], as_text: Format, ideal: float) -> Markup:
    """One dot for each point on a scale around `ideal`, with its number at the end."""
    numbers = [point.number for point in points if point.number is not None]
    reach = max((abs(number - ideal) for number in numbers), default=0.0) * 1.1 or 1e-9
    x = linear(ideal - reach, ideal + reach, _BARS, _BARS_END)
    middle = tag("line", x1=x(ideal), x2=x(ideal), y1=0, y2=_ROW * len(points), class_="ideal")

    def draw(point: Point, y: float) -> Markup:
        end = x(point.number if point.number is not None else ideal)
        stem = tag("line", x1=x(ideal), x2=end, y1=y, y2=y, class_="stem")
        return stem + mark("circle", point.value, _title(point, as_text), cx=end, cy=y, r=4, class_="dot")

    return _rows(label, points, as_text, [middle], draw)


def _rows(
    label: str,
    points: Sequence[Point],
    as_text: Format,
    parts: list[Markup],
    draw: Callable[[Point, float], Markup],
) -> Markup:
    for index, point in enumerate(points):
        y = _ROW * (index + 0.5)
        parts.append(text(_cut(point.name), 0, y + 4, "name"))
        if point.number is None:
            parts.append(mark("text", point.value, _title(point, as_text), x=_BARS, y=y + 4, class_="bad"))
            parts.append(text("not finite", _BARS, y + 4, "bad"))
            continue
        parts.append(draw(point, y))
        parts.append(text(as_text(point.number) + point.more, WIDTH, y + 4, "number", "end"))
    return drawing(WIDTH, max(_ROW * len(points), _ROW), label, parts)


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _title(point: Point, as_text: Format) -> str:
    return f"{point.name}: " + ("not finite" if point.number is None else as_text(point.number) + point.more)


# --- plots with axes -------------------------------------------------------------------------------------------------


def columns(label: str, points: Sequence[Point], unit: Unit, axis: str) -> Markup:
    """One column for each point, from zero, side by side. `axis` names their order."""
    largest = max((point.number or 0.0 for point in points), default=0.0) or 1.0
    y = linear(0, largest * 1.08, _BASE, _TOP)
    left, parts = _grid(ticks(0, largest * 1.08, 4), y, unit.apart)
    parts += _below(points, axis, left)
    step = (_RIGHT - left) / max(len(points), 1)
    for index, point in enumerate(points):
        top, x = y(point.number or 0.0), left + step * (index + 0.5)
        if point.number is None:
            parts.append(mark("text", point.value, _title(point, unit.text), x=x, y=_BASE - 4, class_="bad"))
            parts.append(text("\N{MULTIPLICATION SIGN}", x, _BASE - 4, "bad", "middle"))
            continue
        width = min(step * 0.72, 28)
        place = {"x": x - width / 2, "y": top, "width": width, "height": max(_BASE - top, 0.5)}
        parts.append(mark("rect", point.value, _title(point, unit.text), class_="bar", **place))
    return drawing(WIDTH, _HEIGHT, label, parts)


def dots(label: str, points: Sequence[Point], unit: Unit, axis: str, ideal: float) -> Markup:
    """One dot for each point, side by side, on a scale around `ideal`."""
    numbers = [point.number for point in points if point.number is not None]
    reach = max((abs(number - ideal) * 1.15 for number in numbers), default=0.0)
    reach = max(reach, _LEAST_REACH)
    y = linear(ideal - reach, ideal + reach, _BASE, _TOP)
    left, parts = _grid(ticks(ideal - reach, ideal + reach, 4), y, unit.apart)
    parts += _below(points, axis, left)
    parts.append(tag("line", x1=left, x2=_RIGHT, y1=y(ideal), y2=y(ideal), class_="ideal"))
    step = (_RIGHT - left) / max(len(points), 1)
    for index, point in enumerate(points):
        x = left + step * (index + 0.5)
        if point.number is None:
            continue
        parts.append(tag("line", x1=x, x2=x, y1=y(ideal), y2=y(point.number), class_="stem"))
        radius = max(min(step * 0.3, 4), 1.5)
        parts.append(
            mark("circle", point.value, _title(point, unit.text), cx=x, cy=y(point.number), r=radius, class_="dot")
        )
    return drawing(WIDTH, _HEIGHT, label, parts)


def quantiles(label: str, pairs: Node) -> Markup:
    """KL divergence at each quantile, on a logarithmic scale. Quantiles are evenly spaced, to show the tails."""
    positive = [pair[1].value for pair in pairs if pair[1].value > 0] or [1.0]
    low, high = 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** math.ceil(math.log10(max(positive)) + 1e-9)
    # The decades to show. One or two positions may be nearly the same in both models, and would stretch the scale.
    low = max(low, high * 1e-8)
    y = logarithmic(low, high, _BASE, _TOP)
    left, parts = _grid(_decade_ticks(low, high), y, lambda values: [f"{value:g}" for value in values])
    step = (_RIGHT - left) / len(pairs.value)
    places = [(left + step * (index + 0.5), y(pair[1].value)) for index, pair in enumerate(pairs)]
    parts.append(tag("polyline", points=" ".join(f"{x:.1f},{height:.1f}" for x, height in places), class_="curve"))
    for (x, height), pair in zip(places, pairs, strict=True):
        name = {0: "min", 1: "max"}.get(pair[0].value, f"{100 * pair[0].value:g}")
        parts.append(text(name, x, _BASE + 14, None, "middle"))
        parts.append(mark("circle", pair[1], f"{name}: {NATS.text(pair[1].value)}", cx=x, cy=height, r=3, class_="dot"))
    parts.append(text("quantile of the predictions, %", (left + _RIGHT) / 2, _HEIGHT - 4, None, "middle"))
    return drawing(WIDTH, _HEIGHT, label, parts)


def heat(label: str, counts: Node) -> Markup:
    """Counts as shades, by their logarithm: rows upwards, columns to the right, the diagonal outlined."""
    size, largest = len(counts.value), max(map(max, counts.value))
    side, left = 27.0, 62.0
    bottom = 4 + side * size
    parts = []
    for row, columns_ in enumerate(counts):
        for column, cell in enumerate(columns_):
            shade = math.log1p(cell.value) / math.log1p(largest) if largest else 0.0
            place = {"x": left + side * column, "y": bottom - side * (row + 1), "width": side - 1, "height": side - 1}
            title = f"{row / size:g} … {(row + 1) / size:g} before, {column / size:g} … {(column + 1) / size:g} after: "
            look = {"class_": "cell", "fill_opacity": f"{shade:.3f}"} if cell.value else {"class_": "cell empty"}
            parts.append(mark("rect", cell, title + count(cell.value), **look, **place))
            if row == column:
                parts.append(tag("rect", class_="diagonal", **place))
    for edge in (0, 0.5, 1):
        away = side * size * edge
        parts.append(text(f"{edge:g}", left + away, bottom + 14, None, "middle"))
        parts.append(text(f"{edge:g}", left - 6, bottom - away + 4 + 6 * (edge == 1), None, "end"))
    middle = bottom - side * size / 2
    turned = tag("text", "trained model", transform=f"rotate(-90 26 {middle:g})", x=26, y=middle, text_anchor="middle")
    parts += [turned, text("artifact", left + side * size / 2, bottom + 28, None, "middle")]
    return drawing(WIDTH, bottom + 34, label, parts)


def _decade_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from one value to the other; in a single decade, also 2 and 5 times its power."""
    first, last = round(math.log10(low)), round(math.log10(high))
    decades = [10.0**power for power in range(first, last + 1)]
    return [low, 2 * low, 5 * low, high] if last == first + 1 else decades[:: 1 + len(decades) // 6]


def _grid(
    values: Sequence[float], y: Callable[[float], float], as_texts: Callable[[Sequence[float]], list[str]]
) -> tuple[float, list[Markup]]:
    """The left end of the frame, which leaves room for the labels of the ticks; lines and labels."""
    texts = as_texts(values)
    left = max(_LEFT, 8 + _LETTER * max(map(len, texts)))
    lines = [tag("line", x1=left, x2=_RIGHT, y1=y(value), y2=y(value), class_="grid") for value in values]
    return left, lines + [
        text(label, left - 6, y(at) + 4, None, "end") for at, label in zip(values, texts, strict=True)
    ]


def _below(points: Sequence[Point], axis: str, left: float) -> list[Markup]:
    """Names under the base line, as many as there is room for, and the axis' title."""
    step, every = (_RIGHT - left) / max(len(points), 1), max(1, math.ceil(len(points) / 10))
    names = [
        text(point.name, left + step * (index + 0.5), _BASE + 14, None, "middle")
        for index, point in enumerate(points)
        if index % every == 0
    ]
    return [*names, text(axis, (left + _RIGHT) / 2, _HEIGHT - 4, None, "middle")]
