"""The embedded text: prose, reference and code of many subjects, made from a Python installation's own files."""

from __future__ import annotations

import ast
import codecs
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

# The help topics fill the beginning, which verification scores. So figures stay comparable.
BEGINNING_CHARACTERS = 64_000
# About as much as a window of 1,024 tokens, so that most of a window is of one subject.
_PIECE_CHARACTERS = 4_000
# One piece of code in six is kept. Otherwise there would be four times as much code as docstrings.
_CODE_STEP = 6
# Unlike subjects, and no module that a distribution splits off (tkinter, idlelib, ensurepip, test).
# They are read as text and never imported. A module that this Python lacks is left out.
_MODULES = (
    "_pydecimal", "argparse", "ast", "asyncio/base_events", "asyncio/streams", "asyncio/tasks", "base64", "calendar",
    "cmd", "collections/__init__", "colorsys", "concurrent/futures/_base", "configparser", "contextlib", "csv",
    "dataclasses", "difflib", "email/_header_value_parser", "email/message", "enum", "fractions", "ftplib",
    "functools", "gettext", "graphlib", "hashlib", "heapq", "html/parser", "http/__init__", "http/client",
    "http/cookiejar", "http/server", "imaplib", "importlib/_bootstrap", "inspect", "ipaddress", "json/decoder",
    "json/encoder", "logging/__init__", "mailbox", "mimetypes", "multiprocessing/pool", "optparse", "pickle",
    "pickletools", "platform", "plistlib", "pprint", "random", "re/_parser", "sched", "selectors", "shlex", "shutil",
    "smtplib", "socket", "socketserver", "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "tomllib/_parser", "traceback", "typing", "unittest/case", "unittest/mock",
    "urllib/parse", "urllib/request", "uuid", "wave", "weakref", "wsgiref/handlers", "xml/dom/minidom",
    "xml/etree/ElementTree", "xmlrpc/client", "zipfile", "zipfile/__init__", "zoneinfo/_zoneinfo",
)  # fmt: skip
_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@cache
def embedded_beginning() -> str:
    """The first 64,000 characters of the embedded text, up to the end of a paragraph. Making it is quick."""
    return "\n\n".join(_split(_topics())[0])


@cache
def embedded_text() -> str:
    """The whole embedded text, over 1.5 million characters. Every call gives the same; another Python's may differ.

    It begins with topics of Python's built-in help. Pieces of the other topics, of the standard library's docstrings
    and code, and of its licence follow, in a fixed mixed order. No paragraph occurs twice.
    """
    topics = _topics()
    beginning, rest = _split(topics)
    seen = set(topics)
    pieces = dict(_pieces("topics", rest))
    for name, text in _texts():
        pieces |= _pieces(name, _new(_paragraphs(text), seen))
    for module, docstrings, code in _modules():
        pieces |= _pieces(f"{module} docstrings", _new(_paragraphs(docstrings), seen))
        pieces |= list(_pieces(f"{module} code", _new(_paragraphs(code), seen)))[::_CODE_STEP]
    # In the order of the names' hashes, so that a few windows already cover unlike subjects.
    order = sorted(pieces, key=lambda name: hashlib.sha256(name.encode()).digest())
    return "\n\n".join([*beginning, *(pieces[name] for name in order)])


def _topics() -> list[str]:
    """The paragraphs of the built-in help. Its topics are in a mixed order too."""
    from pydoc_data.topics import topics

    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    # Topics repeat each other's paragraphs, and a model predicts a repeated paragraph too easily.
    return list(dict.fromkeys(part for name in order for part in topics[name].strip().split("\n\n")))


def _split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """The paragraphs of the beginning, and the others."""
    length = 0
    for count, paragraph in enumerate(paragraphs, 1):
        length += len(paragraph) + 2
        if length >= BEGINNING_CHARACTERS + 2:
            return paragraphs[:count], paragraphs[count:]
    return paragraphs, []


def _new(paragraphs: Iterable[str], seen: set[str]) -> list[str]:
    """The paragraphs that are not in `seen`; adds them to it."""
    found = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
    seen.update(found)
    return found


def _pieces(name: str, paragraphs: list[str]) -> Iterator[tuple[str, str]]:
    """Join paragraphs that follow each other until they fill a piece. Gives each piece with a name."""
    piece: list[str] = []
    length = number = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        length += len(paragraph) + 2
        if length >= _PIECE_CHARACTERS:
            yield f"{name} {number}", "\n\n".join(piece)
            piece, length, number = [], 0, number + 1
    if piece:
        yield f"{name} {number}", "\n\n".join(piece)


def _texts() -> Iterator[tuple[str, str]]:
    """Texts other than help and code: (name, text)."""
    if (licence := _LIBRARY / "LICENSE.txt").is_file():
        yield "licence", licence.read_text(encoding="utf-8")
    if (zen := _LIBRARY / "this.py").is_file():
        yield "zen", _decoded(zen.read_text(encoding="utf-8"))


def _modules() -> Iterator[tuple[str, str, str]]:
    """Modules of the standard library: (name, docstrings, code without them)."""
    for module in _MODULES:
        file = _LIBRARY / f"{module}.py"
        if file.is_file():
            yield module, *_parts(file.read_text(encoding="utf-8"))


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n(?:[ \t\f]*\n)+", text.strip("\n")) if part.strip()]


def _parts(source: str) -> tuple[str, str]:
    """A module's docstrings, and its lines without them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: list[str] = []
    lines: list[str | None] = list(source.split("\n"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)) is not None:
            docstrings.append(text)
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [None] * (
                (first.end_lineno or first.lineno) - first.lineno + 1
            )
    return "\n\n".join(docstrings), "\n".join(line for line in lines if line is not None)


def _decoded(source: str) -> str:
    """The Zen of Python from this.py, where it is the one long string, in ROT13."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return codecs.decode(max((text for text in texts if isinstance(text, str)), key=len, default=""), "rot13")
