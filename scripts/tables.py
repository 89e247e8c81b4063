"""Plain text tables and JSON files: how every script here shows its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns: the first column to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in pairs).rstrip()
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


def megabytes(count: float) -> str:
    """Bytes as megabytes (10^6) with one decimal."""
    return f"{count / 1e6:,.1f}"


def write_json(path: Path | None, figures: object) -> None:
    """Write figures as indented JSON, or do nothing where no path was asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
