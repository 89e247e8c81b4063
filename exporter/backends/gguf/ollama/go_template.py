"""Renders the part of Go's template language that Ollama's templates here are written in (pkg.go.dev/text/template).

Text, trim markers, `if`, `range`, variables, fields, and the functions `and or not eq ne gt len slice`. A template is
held against the model's own by rendering what is written to the Modelfile, not what it is made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_ACTION = re.compile(
    r"\{\{(?P<left>- )?\s*(?P<body>(?:\"(?:[^\"\\]|\\.)*\"|(?!\}\}).)*?)\s*(?P<right> -)?\}\}", re.DOTALL
)
_TOKEN = re.compile(r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?\d+)|(?P<mark>:=|[=(),])|(?P<word>[$.\w]+))')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


@dataclass(frozen=True)
class Json:
    """A value that is printed as JSON.

    Attributes:
        text: how it is spelled.
    """

    text: str


@dataclass(frozen=True)
class _Branch:
    """An `if` or `range`: each pipeline with its body; None for `else`."""

    keyword: str
    arms: tuple[tuple[str | None, tuple[_Node, ...]], ...]


_Node = str | tuple[str, str] | _Branch


def quoted(text: str) -> str:
    """A Go string literal. What Ollama's reader of Modelfiles drops, because it is not printable, is escaped."""
    escapes = {value: f"\\{key}" for key, value in _ESCAPES.items()}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def render(source: str, values: Mapping[str, Any]) -> str:
    """Execute a template.

    Args:
        source: the template.
        values: what `.` and `$` are: strings, booleans, integers, `Json`, and mappings and sequences of those.

    Raises:
        ValueError: it is not written in the part of the language that is known here.
    """
    return "".join(_execute(_compiled(source), values, [{"$": values}]))


@cache
def _compiled(source: str) -> tuple[_Node, ...]:
    pieces = list(_pieces(source))
    nodes, rest = _parse(pieces, 0)
    if rest != len(pieces):
        raise ValueError("an end without a beginning")
    return nodes


def _pieces(source: str) -> Iterator[tuple[str, str]]:
    """Texts and actions in order, trimmed as their markers say."""
    at, trim = 0, False
    for match in _ACTION.finditer(source):
        text = source[at : match.start()]
        text = text.lstrip() if trim else text
        yield "text", text.rstrip() if match["left"] else text
        yield "action", match["body"]
        at, trim = match.end(), bool(match["right"])
    yield "text", source[at:].lstrip() if trim else source[at:]


def _parse(pieces: Sequence[tuple[str, str]], at: int) -> tuple[tuple[_Node, ...], int]:
    """Nodes up to the `else` or `end` that is not theirs."""
    nodes: list[_Node] = []
    while at < len(pieces):
        kind, body = pieces[at]
        word = body.split(None, 1)[0] if kind == "action" and body else ""
        if word in ("else", "end"):
            return tuple(nodes), at
        if word in ("if", "range"):
            branch, at = _parse_branch(pieces, at, word)
            nodes.append(branch)
        else:
            nodes.append(body if kind == "text" else ("action", body))
        at += 1
    return tuple(nodes), at


def _parse_branch(pieces: Sequence[tuple[str, str]], at: int, keyword: str) -> tuple[_Branch, int]:
    arms: list[tuple[str | None, tuple[_Node, ...]]] = []
    condition: str | None = pieces[at][1].removeprefix(keyword)
    while True:
        body, at = _parse(pieces, at + 1)
        arms.append((condition, body))
        if at == len(pieces):
            raise ValueError(f"no end of {keyword}")
        if pieces[at][1] == "end":
            return _Branch(keyword, tuple(arms)), at
        condition = pieces[at][1].removeprefix("else").strip().removeprefix("if") or None


def _execute(nodes: Sequence[_Node], dot: Any, scopes: list[dict[str, Any]]) -> Iterator[str]:
    scopes = [*scopes, {}]
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, tuple):
            yield _printed(_pipeline(node[1], dot, scopes))
        elif node.keyword == "if":
            chosen = (body for condition, body in node.arms if condition is None or _pipeline(condition, dot, scopes))
            yield from _execute(next(chosen, ()), dot, scopes)
        else:
            yield from _range(node, dot, scopes)


def _range(node: _Branch, dot: Any, scopes: list[dict[str, Any]]) -> Iterator[str]:
    (head, body), names = node.arms[0], []
    if head and ":=" in head:
        declared, _, head = head.partition(":=")
        names = [name.strip() for name in declared.split(",")]
    for index, item in enumerate(_pipeline(head or "", dot, scopes) or ()):
        # Of one name the value, of two the index first.
        values = (index, item)[2 - len(names) :] if names else ()
        yield from _execute(body, item, [*scopes, dict(zip(names, values, strict=True))])


def _pipeline(text: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    """The value of a pipeline; of a declaration or an assignment nothing."""
    tokens = _tokens(text.strip())
    if len(tokens) > 1 and tokens[1][1] in (":=", "="):
        name = tokens[0][1]
        scope = scopes[-1] if tokens[1][1] == ":=" else next((s for s in reversed(scopes) if name in s), None)
        if scope is None:
            raise ValueError(f"{name} is not declared")
        scope[name] = _command(tokens[2:], dot, scopes)
        return ""
    return _command(tokens, dot, scopes)


@cache
def _tokens(text: str) -> tuple[tuple[str, str], ...]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text!r} is not known here")
        tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
        at = match.end()
    return tuple(tokens)


def _command(tokens: Sequence[tuple[str, str]], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    """A value, or a function and its arguments."""
    words: list[Any] = []
    inner: list[tuple[str, str]] = []
    depth = 0
    for kind, text in tokens:
        if text == ")" and kind == "mark":
            depth -= 1
            if depth == 0:
                words.append(_command(inner, dot, scopes))
                inner = []
                continue
        if depth:
            inner.append((kind, text))
        elif text != "(":
            words.append(_operand(kind, text, dot, scopes, first=not words))
        depth += text == "(" and kind == "mark"
    if words and callable(words[0]):
        return words[0](*words[1:])
    if len(words) != 1:
        raise ValueError(f"{' '.join(text for _, text in tokens)!r} is not known here")
    return words[0]


def _operand(kind: str, text: str, dot: Any, scopes: list[dict[str, Any]], *, first: bool) -> Any:
    if kind == "string":
        return re.sub(r"\\(?:U([0-9a-f]{8})|(.))", lambda m: chr(int(m[1], 16)) if m[1] else _ESCAPES[m[2]], text[1:-1])
    if kind == "number":
        return int(text)
    if first and text in _FUNCTIONS:
        return _FUNCTIONS[text]
    name, *fields = text.split(".")
    try:
        value = next(scope[name] for scope in reversed(scopes) if name in scope) if name else dot
    except StopIteration:
        raise ValueError(f"{text!r} is not known here") from None
    for field in fields:
        value = value[field] if field else value
    return value


def _all(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _any(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "and": _all,
    "or": _any,
    "not": lambda value: not value,
    "eq": lambda one, other: one == other,
    "ne": lambda one, other: one != other,
    "gt": lambda one, other: one > other,
    "len": len,
    "slice": lambda values, start: values[start:],
}


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.text if isinstance(value, Json) else str(value)
