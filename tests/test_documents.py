"""Links between pages lead somewhere, commands name scripts that exist, and examples are the repository's own code."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from exporter.adapters.base import AdapterMethod, Update
from exporter.backends.base import Backend, Writer
from exporter.families.base import Family, Row
from exporter.families.gguf import GgufSpelling
from exporter.runtimes.base import Runtime, Session

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md")])
ADDING = ROOT / "docs" / "adding"
# Stands for lines of a file that an example leaves out.
GAP = "# …"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        # It has names that were.
        text = text.partition("## [Unreleased]")[0]
    for module in re.findall(r"-m (scripts(?:\.\w+)+)", text):
        if module.split(".")[1].islower():
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for file in re.findall(r"(?:scripts|exporter|tests)/[\w/]+\.py", text):
        assert (ROOT / file).is_file(), file


# --- docs/adding -----------------------------------------------------------------------------------------------------


def examples() -> list[Any]:
    """Parameters of a test: name of the page, language and text of every example."""
    fenced = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(page.name, *found.groups(), id=f"{page.stem}-{number}")
        for page in sorted(ADDING.glob("*.md"))
        for number, found in enumerate(fenced.finditer(page.read_text(encoding="utf-8")))
    ]


def runs(text: str) -> list[list[str]]:
    """An example's lines from gap to gap, without empty ones and the first, which names the file."""
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    return [list(group) for gap, group in groupby(lines, lambda line: line.strip() == GAP) if not gap]


def missing(text: str, source: str) -> list[str] | None:
    """The first run of an example's lines that a file does not have after the one before it; None if it has all."""
    lines, start = [line for line in source.splitlines() if line.strip()], 0
    for run in runs(text):
        places = range(start, len(lines) - len(run) + 1)
        place = next((at for at in places if lines[at : at + len(run)] == run), None)
        if place is None:
            return run
        start = place + len(run)
    return None


@pytest.mark.parametrize(("page", "language", "text"), examples())
def test_an_example_is_the_code_of_its_file(page: str, language: str, text: str) -> None:
    named = re.fullmatch(r"# (\S+)", text.splitlines()[0])
    assert named, f"the first line of an example in {page} names its file: {text[:80]!r}"
    assert missing(text, (ROOT / named[1]).read_text(encoding="utf-8")) is None
    if language == "python":
        compile(dedent(text.partition("\n")[2]), page, "exec")


def test_lines_that_a_file_has_not_in_that_order_are_found() -> None:
    source = "a = 1\n\nb = 2\nc = 3\n"
    assert missing(f"# file\na = 1\nb = 2\n{GAP}\nc = 3\n", source) is None
    assert missing("# file\na = 1\nc = 3\n", source) == ["a = 1", "c = 3"]
    assert missing(f"# file\nc = 3\n{GAP}\na = 1\n", source) == ["a = 1"]


def members(of: type) -> set[str]:
    """Public names that a class defines or annotates."""
    return {name for name in {*vars(of), *of.__annotations__} if not name.startswith("_")}


@pytest.mark.parametrize(
    ("page", "of"),
    [
        ("family", Family), ("family", Row), ("family", GgufSpelling), ("adapter", AdapterMethod), ("adapter", Update),
        ("format", Backend), ("format", Writer), ("runtime", Runtime), ("runtime", Session),
    ],
)  # fmt: skip
def test_a_page_names_every_member_of_the_class(page: str, of: type) -> None:
    named = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", (ADDING / f"{page}.md").read_text(encoding="utf-8")))
    assert members(of) <= named


@pytest.mark.parametrize("page", sorted(ADDING.glob("*.md")), ids=lambda page: page.stem)
def test_names_that_a_page_mentions_exist(page: Path) -> None:
    code = [
        file for folder in ("exporter", "tests") for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)
    ]
    known = {word for file in code for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = [names for names in re.findall(r"`([\w.]+)(?:\([^`]*\))?`", prose) if not names.endswith(".md")]
    assert {name for names in named for name in names.split(".") if name} <= known


@pytest.mark.parametrize("of", [Update, AdapterMethod, Backend, Writer, Runtime, Session])
def test_a_page_gives_methods_the_arguments_that_they_have(of: type) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(ADDING.glob("*.md")))
    table = re.search(rf"^\| member of `{of.__name__}`.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert table
    for name, given in re.findall(r"`(\w+)\(([^`)]*)\)`", table[0]):
        code = getattr(of, name)
        code = getattr(code, "__func__", code).__code__
        arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        assert given == "…" or tuple(re.sub(r"=….*", "", one) for one in given.split(", ") if one) == arguments, name
