"""Draws size against quality as an SVG that fits light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from exporter.compare.compare import Compared, Comparison
from exporter.publish.report.svg import ticks
from exporter.units import size

_LABEL_HEIGHT, _LETTER = 14, 6.6
# The largest change of perplexity, in percent, on the y axis. A model above it is ruined, and is drawn here.
_RUINED = 1000.0
# Verdicts have forms too, for people who do not tell the colours apart.
_STYLE = """
  svg { --ink: #1b1f24; --faint: #d0d7de; --paper: #ffffff; --passed: #1a7f37; --failed: #cf222e; --undecided: #9a6700;
    background: var(--paper); font: 12px system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --faint: #30363d; --paper: #0d1117; --passed: #3fb950;
    --failed: #f85149; --undecided: #d29922; } }
  text { fill: var(--ink); } .grid { stroke: var(--faint); } .lead { stroke: var(--ink); stroke-opacity: .4; }
  .passed { fill: var(--passed); } .failed { fill: none; stroke: var(--failed); stroke-width: 2.5; }
  .undecided, .skipped { fill: none; stroke: var(--undecided); stroke-width: 2.5; }
""".strip()

# The page has one drawing for a phone and one for a wide screen. Neither is scaled, so letters keep their size.
_PAGE_STYLE = """
  body { margin: 2rem auto; max-width: 760px; padding: 0 16px; font: 15px/1.5 system-ui, sans-serif;
    overflow-wrap: anywhere; background: #ffffff; color: #1b1f24; }
  svg { display: block; width: 100%; height: auto; } .narrow { display: none; max-width: 480px; }
  @media (max-width: 791px) { body { margin: 1rem auto; } .wide { display: none; } .narrow { display: block; } }
  @media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3; } }
""".strip()


@dataclass(frozen=True)
class _Frame:
    """The size of a drawing in pixels, and the ends of its axes.

    Attributes:
        width: of all.
        height: of all.
        left: of the plot: room for the numbers of the y axis.
        most: steps of the x axis whose numbers have room beside each other.
        right: room on that side.
        top: room above, for what is drawn.
        bottom: room below, for the numbers of the x axis.
    """

    width: int
    height: int
    left: int
    most: int
    right: int = 24
    top: int = 44
    bottom: int = 54

    @property
    def letters(self) -> int:
        """The most letters of a label that does not cover the numbers of the y axis."""
        return int((self.width - self.left - 4) / _LETTER)


_WIDE = _Frame(760, 460, 78, 8)
# As wide as a phone's screen.
_NARROW = _Frame(358, 420, 58, 4)


def plot_svg(comparison: Comparison) -> str:
    """Draw bytes on the x axis, and on the y axis mean KL, or the change of perplexity if an artifact has no full KL.

    Artifacts without a figure are left out.
    """
    return _drawn(comparison, _WIDE)


def plot_html(comparison: Comparison) -> str:
    """The plot as a page that fits the screen's width, with the warnings below it."""
    warnings = "".join(f"<p>{escape(warning)}</p>" for warning in comparison.warnings)
    drawings = (
        f'<div class="{name}">{_drawn(comparison, frame)}</div>'
        for name, frame in (("wide", _WIDE), ("narrow", _NARROW))
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Size and quality</title><style>{_PAGE_STYLE}</style></head>\n<body>\n{''.join(drawings)}{warnings}\n"
        "</body>\n</html>\n"
    )


def _drawn(comparison: Comparison, frame: _Frame) -> str:
    full = [artifact for artifact in comparison.artifacts if artifact.divergence is not None]
    scored = [artifact for artifact in comparison.artifacts if artifact.change is not None]
    if len(full) == len(scored):
        name, points = "mean KL (nats)", [(artifact, float(artifact.divergence or 0)) for artifact in full]
    else:
        name = "|change of perplexity| (%)"
        points = [(artifact, min(100 * float(artifact.change or 0), _RUINED)) for artifact in scored]
    return _svg(name, points, frame)


def _svg(name: str, points: Sequence[tuple[Compared, float]], frame: _Frame) -> str:
    right = max((artifact.bytes for artifact, _ in points), default=1) * 1.15
    top = max((value for _, value in points), default=0) * 1.15 or 1.0
    end, base = frame.width - frame.right, frame.height - frame.bottom

    def place(nbytes: float, value: float) -> tuple[float, float]:
        return frame.left + (end - frame.left) * nbytes / right, base + (frame.top - base) * value / top

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="Size and {escape(name)} of {len(points)} artifacts">',
        f"<style>{_STYLE}</style>",
        f'<text x="4" y="22">{escape(name)}; the lower left is better</text>',
        f'<text x="{end}" y="{frame.height - 12}" text-anchor="end">size</text>',
    ]
    for tick in ticks(0, top, 8):
        _, y = place(0, tick)
        lines.append(f'<line class="grid" x1="{frame.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(0, right, frame.most):
        x, y = place(tick, 0)
        lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{size(tick)}</text>')
    placed = [(artifact, *place(artifact.bytes, value)) for artifact, value in points]
    return "\n".join([*lines, *_points(placed, frame), "</svg>"])


def _points(points: Sequence[tuple[Compared, float, float]], frame: _Frame) -> list[str]:
    """Marks and their labels. A label moves up or down until it covers no other label and no mark."""
    lines: list[str] = []
    taken = [(x - 6, x + 6, y) for _, x, y in points]
    for artifact, x, y in sorted(points, key=lambda point: (point[2], point[1])):
        text = _cut(artifact.label, frame.letters)
        wide = len(text) * _LETTER
        # Right of the mark, or left of it, or where there is room.
        left = x + 10 if x + 10 + wide < frame.width else max(x - 10 - wide, frame.left + 2)
        label = y
        steps = (sign * step * _LABEL_HEIGHT for step in range(frame.height // _LABEL_HEIGHT) for sign in (1, -1))
        for step in steps:
            label = y + step
            apart = all(
                abs(label - other) >= _LABEL_HEIGHT or left > end or left + wide < start for start, end, other in taken
            )
            if apart and frame.top <= label <= frame.height - frame.bottom:
                break
        taken.append((left, left + wide, label))
        if abs(label - y) > 1:
            # A line leads to the middle of the side that faces the mark, for a label above or below it.
            edge = min(max(x, left - 2), left + wide + 2)
            side = label if not left <= x <= left + wide else label + math.copysign(_LABEL_HEIGHT / 2, y - label)
            lines.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{edge:.1f}" y2="{side:.1f}"/>')
        lines.append(_mark(artifact.verdict, x, y))
        # Letters are narrower than is reckoned: the end that is next to the mark is where it is said to be.
        anchor, start = (' text-anchor="end"', left + wide) if left + wide < x else ("", left)
        lines.append(f'<text x="{start:.1f}" y="{label + 4:.1f}"{anchor}>{escape(text)}</text>')
    return lines


def _cut(label: str, most: int) -> str:
    """Shorten a label to its room: drop the middle, and keep the end, which says the type."""
    if len(label) <= most:
        return label
    first = most // 3
    return f"{label[:first]}…{label[first + 1 - most :]}"


def _mark(verdict: str, x: float, y: float) -> str:
    if verdict == "failed":
        return f'<path class="failed" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"><title>failed</title></path>'
    kind = verdict if verdict in ("passed", "skipped") else "undecided"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(verdict)}</title></circle>'
