"""The limits in docs/ are those of the gate, and those from 1 B on follow the rule that docs/measurements states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from exporter.plan.gate_limits import FALLBACK_GATE, TOP_K_SHARE, Gate
from tests.default_gates import DEFAULT_GATES, LARGE_GATES

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "measurements").glob("*.md")))
Rows = list[list[str]]
GROUPS = {"groups of 32 to 128": ("g32", "g64", "g128"), "one group a row": ("gall",)}


def tables(text: str = TEXT) -> list[Rows]:
    """Every table of a text: its header, and its rows without the rule below the header."""
    found = re.findall(r"(?:^\|.*\|$\n)+", text, re.MULTILINE)
    parsed = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in parsed]


def words(text: str) -> str:
    """A text without its line ends."""
    return " ".join(text.split())


def column(header: list[str], beginning: str) -> int:
    return next(number for number, name in enumerate(header) if name.startswith(beginning))


def limits(cells: list[str]) -> tuple[float, float, float]:
    """Change, KL divergence and same top token of three cells."""
    change, divergence, same_top = cells
    return share(change.removeprefix("±")), float(divergence), share(same_top)


def share(cell: str) -> float:
    assert cell.endswith("%")
    return float(cell[:-1]) / 100


def of(gate: Gate) -> tuple[float, float, float]:
    return gate.max_delta, gate.max_divergence, gate.min_same_top


def labels(cell: str) -> list[str]:
    """The labels that a row is about; empty for other formats than ours."""
    if not cell.startswith("gptq-"):
        return [cell] if cell.startswith(("gguf ", "safetensors ")) else []
    bits, _, groups = cell.partition(", ")
    quants = [f"{bits}-{group}" for group in GROUPS[groups]] if groups else [bits]
    return [f"{backend} {quant}" for backend in ("gptq", "gptqmodel") for quant in quants]


def classes() -> Rows:
    return next(table for table in tables() if any(name.startswith("from 1 B") for name in table[0]))


def test_limits_beside_measurements_are_those_below_1_b() -> None:
    seen: set[str] = set()
    for header, *rows in tables():
        if "limits: change" not in header:
            continue
        first = column(header, "limits: change")
        for row in rows:
            if row[first]:
                # "gguf Q4_K_M, for comparison"
                of_row = labels(row[0].split(",")[0])
                assert of_row
                for label in of_row:
                    assert limits(row[first : first + 3]) == pytest.approx(of(DEFAULT_GATES[label])), label
                seen |= set(of_row)
    assert {label for label in DEFAULT_GATES if not label.startswith("gptq")} <= seen
    assert {label.split("-")[1] for label in seen if label.startswith("gptq ")} == {"int8", "int4", "int3", "int2"}


@pytest.mark.parametrize(
    ("title", "gates"), [("below 1 B", DEFAULT_GATES), ("from 1 B", LARGE_GATES)], ids=["small", "large"]
)
def test_the_table_of_classes_is_that_of_the_gate(title: str, gates: Mapping[str, Gate]) -> None:
    header, *rows = classes()
    first, seen = column(header, title), list[str]()
    for row in rows:
        found = limits(row[first : first + 3])
        for label in labels(row[0]):
            assert found == pytest.approx(of(gates[label])), label
        if not labels(row[0]):
            assert row[0] == "formats of other packages"
            assert found == pytest.approx(of(FALLBACK_GATE))
        seen += labels(row[0]) or [row[0]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {*gates, "formats of other packages"}


def test_the_page_for_users_shows_limits_from_1_b_on() -> None:
    shown = (DOCS / "quality.md").read_text(encoding="utf-8")
    assert f"{TOP_K_SHARE:g} times that on the whole form" in words(shown)
    header, *rows = next(table for table in tables(shown) if table[0][1:] == ["change", "mean KL", "same top"])
    assert len(rows) > 3, header
    for row in rows:
        for label in labels(row[0].replace(" in groups", ", groups of 32 to 128")):
            assert limits(row[1:]) == pytest.approx(of(LARGE_GATES[label])), label


def test_limits_from_1_b_on_follow_the_rule() -> None:
    """2.5 times the larger published figure, rounded up to two digits; never wider, and ±0.5 % at least."""
    header, *rows = classes()
    change, divergence = column(header, "published: change, 8 B"), column(header, "published: KL")
    ruled = 0
    for row in rows:
        for label in labels(row[0]):
            small, large = DEFAULT_GATES[label], LARGE_GATES[label]
            published = [share(cell.split(" ")[0]) for cell in row[change : change + 2] if cell]
            if not published:
                assert of(large) == of(small)
            if not row[divergence]:
                continue
            ruled += 1
            wanted = max(2.5 * max(published), 0.005)
            assert wanted - 1e-9 <= large.max_delta * 1.0001 or large.max_delta == small.max_delta, label
            assert large.max_delta <= min(small.max_delta, 1.1 * wanted), label
            wanted = 2.5 * float(row[divergence])
            assert wanted - 1e-9 <= large.max_divergence or large.max_divergence == small.max_divergence, label
            assert large.max_divergence <= min(small.max_divergence, 1.1 * wanted), label
    assert ruled == 27


def test_the_limit_on_the_top_k_form_is_the_share_that_stands_there() -> None:
    assert f"the limit on the top-k form is {TOP_K_SHARE:g} times that on the whole one" in words(TEXT)
    for gates in (DEFAULT_GATES, LARGE_GATES):
        for label, gate in gates.items():
            if not label.startswith("gguf "):
                assert gate.max_top_k_divergence == pytest.approx(TOP_K_SHARE * gate.max_divergence)
    header, *rows = next(table for table in tables() if table[0][-1] == "ratio")
    ratios = [float(row[column(header, "ratio")].split(" ")[0]) for row in rows]
    assert max(ratios) <= TOP_K_SHARE <= max(ratios) + 0.01
