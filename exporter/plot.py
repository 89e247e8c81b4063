"""Size against quality as an SVG, which light and dark pages show as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from exporter.compare import Compared, Comparison
from exporter.units import size

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 44, 54
_LABEL_HEIGHT, _LETTER = 14, 6.6
# A change of perplexity in percent above which a model is ruined, whatever its figure, and is drawn here.
_RUINED = 1000.0
# Verdicts by form too, for those who do not tell the colours apart.
_STYLE = """
  svg { --ink: #1b1f24; --faint: #d0d7de; --paper: #ffffff; --passed: #1a7f37; --failed: #cf222e; --undecided: #9a6700;
    background: var(--paper); font: 12px system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --faint: #30363d; --paper: #0d1117; --passed: #3fb950;
    --failed: #f85149; --undecided: #d29922; } }
  text { fill: var(--ink); } .grid { stroke: var(--faint); } .lead { stroke: var(--ink); stroke-opacity: .4; }
  .passed { fill: var(--passed); } .failed { fill: none; stroke: var(--failed); stroke-width: 2.5; }
  .undecided, .skipped { fill: none; stroke: var(--undecided); stroke-width: 2.5; }
""".strip()


def plot_svg(comparison: Comparison) -> str:
    """Bytes on the x axis; on the y axis mean KL, or the change of perplexity if not all artifacts have a full KL.

    Artifacts without a figure are left out.
    """
    full = [artifact for artifact in comparison.artifacts if artifact.divergence is not None]
    scored = [artifact for artifact in comparison.artifacts if artifact.change is not None]
    if len(full) == len(scored):
        name, points = "mean KL (nats)", [(artifact, float(artifact.divergence or 0)) for artifact in full]
    else:
        name = "|change of perplexity| (%)"
        points = [(artifact, min(100 * float(artifact.change or 0), _RUINED)) for artifact in scored]
    return _svg(name, points)


def plot_html(comparison: Comparison) -> str:
    """The plot as a page, with the warnings below it."""
    warnings = "".join(f"<p>{escape(warning)}</p>" for warning in comparison.warnings)
    style = "body { max-width: 48rem; margin: 2rem auto; font: 15px system-ui, sans-serif; } svg { width: 100%; }"
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>Size and quality</title><style>{style}</style></head>\n<body>\n{plot_svg(comparison)}{warnings}\n"
        "</body>\n</html>\n"
    )


def _svg(name: str, points: Sequence[tuple[Compared, float]]) -> str:
    right = max((artifact.bytes for artifact, _ in points), default=1) * 1.15
    top = max((value for _, value in points), default=0) * 1.15 or 1.0
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(nbytes: float, value: float) -> tuple[float, float]:
        return _LEFT + plot_width * nbytes / right, _TOP + plot_height * (1 - value / top)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Size and {escape(name)} of {len(points)} artifacts">',
        f"<style>{_STYLE}</style>",
        f'<text x="{_LEFT}" y="22">{escape(name)}; the lower left is better</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 12}" text-anchor="end">size</text>',
    ]
    for tick in _ticks(top):
        _, y = place(0, tick)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(right):
        x, y = place(tick, 0)
        lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{size(tick)}</text>')
    return "\n".join(
        [*lines, *_points([(artifact, *place(artifact.bytes, value)) for artifact, value in points]), "</svg>"]
    )


def _points(points: Sequence[tuple[Compared, float, float]]) -> list[str]:
    """Marks and their labels; a label moves up or down until it covers no other."""
    lines: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for artifact, x, y in sorted(points, key=lambda point: (point[2], point[1])):
        text = artifact.label
        wide = len(text) * _LETTER
        left = x + 10 if x + 10 + wide < _WIDTH else x - 10 - wide
        label = y
        steps = (sign * step * _LABEL_HEIGHT for step in range(_HEIGHT // _LABEL_HEIGHT) for sign in (1, -1))
        for step in steps:
            label = y + step
            apart = all(
                abs(label - other) >= _LABEL_HEIGHT or left > end or left + wide < start for start, end, other in taken
            )
            if apart and _TOP <= label <= _HEIGHT - _BOTTOM:
                break
        taken.append((left, left + wide, label))
        if abs(label - y) > 1:
            edge = left - 2 if left > x else left + wide + 2
            lines.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{edge:.1f}" y2="{label:.1f}"/>')
        lines.append(_mark(artifact.verdict, x, y))
        lines.append(f'<text x="{left:.1f}" y="{label + 4:.1f}">{escape(text)}</text>')
    return lines


def _mark(verdict: str, x: float, y: float) -> str:
    if verdict == "failed":
        return f'<path class="failed" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"><title>failed</title></path>'
    kind = verdict if verdict in ("passed", "skipped") else "undecided"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(verdict)}</title></circle>'


def _ticks(top: float) -> list[float]:
    """Four to eight round numbers from 0 up to `top`."""
    magnitude: float = 10 ** math.floor(math.log10(top / 4))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if top / (magnitude * factor) <= 8)
    return [number * step for number in range(int(top / step) + 1)]
