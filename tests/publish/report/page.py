"""Reads a report back: its elements, its text, and whether every number on it is the manifest's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link"}
SIZES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
# The 97.5 % quantiles of Student's t, from a table, by degrees of freedom.
T = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 7: 2.3646243}


@dataclass
class Element:
    """An element with its attributes and the text in it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: tuple[str, ...] = ()


@dataclass
class Page(HTMLParser):
    """The elements of a page, in order; fails on tags that do not match."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    @classmethod
    def of(cls, html: bytes) -> Page:
        page = cls()
        HTMLParser.__init__(page)
        page.feed(html.decode())
        page.close()
        assert not page.open
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = tuple(" ".join((one.tag, one.attributes.get("class", ""))) for one in self.open)
        element = Element(tag, {key: value or "" for key, value in attrs}, inside=classes)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, class_: str | None = None) -> list[Element]:
        return [
            one
            for one in self.elements
            if one.tag == tag and (class_ is None or class_ in one.attributes.get("class", "").split())
        ]

    def texts(self, tag: str, class_: str | None = None) -> list[str]:
        return [" ".join(one.text.split()) for one in self.all(tag, class_)]


def resolve(manifest: Mapping[str, Any], pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) points to."""
    place: Any = manifest
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        place = place[int(key)] if isinstance(place, list) else place[key]
    return place


def rounded(text: str, value: float) -> bool:
    """Whether a text is a number, rounded to as many digits as it shows."""
    match = re.fullmatch(r"([+-]?)([\d,]+)(?:\.(\d+))?(e[+-]\d+)?(%| ?[kMG]?B)?", text.replace("\N{MINUS SIGN}", "-"))
    if match is None:
        return False
    sign, whole, decimals, exponent, unit = match.groups()
    factor = 0.01 if unit == "%" else SIZES[unit.strip()] if unit else 1.0
    factor *= 10.0 ** int(exponent[1:]) if exponent else 1.0
    shown = float(f"{sign}{whole.replace(',', '')}.{decimals or 0}")
    step = 10.0 ** -len(decimals or "")
    return abs(shown - value / factor) <= 0.5 * step * (1 + 1e-9) + 1e-9 * abs(shown)


def numbers(manifest: Mapping[str, Any], found: Iterable[tuple[dict[str, str], str]]) -> Iterator[str]:
    """Checks elements that stand for numbers, given as their attributes and text; yields where each is from."""
    for attributes, text in found:
        if (pointer := attributes.get("data-at")) is not None:
            value = json.loads(attributes["value"] if "value" in attributes else attributes["data-value"])
            expected = resolve(manifest, pointer)
            assert value == expected, pointer
            assert type(value) is type(expected), pointer
            if "value" in attributes:
                assert rounded(text, value), (pointer, text, value)
            yield pointer
        elif (pointer := attributes.get("data-length-of")) is not None:
            assert float(attributes["value"]) == float(text) == len(resolve(manifest, pointer)), pointer
            yield pointer
        elif (pointer := attributes.get("data-part-at")) is not None:
            share = resolve(manifest, pointer) / resolve(manifest, attributes["data-whole-at"])
            assert math.isclose(float(attributes["value"]), share), pointer
            assert rounded(text, share), (pointer, text)
            yield f"{pointer} of {attributes['data-whole-at']}"
        elif (pointer := attributes.get("data-error-at")) is not None:
            value, error = resolve(manifest, attributes["data-value-at"]), resolve(manifest, pointer)
            reach = 1.96 if "/weights/" in pointer else T[_windows(manifest, pointer) - 1]
            end = value + (-1, 1)[int(attributes["data-end"])] * reach * error
            assert math.isclose(float(attributes["value"]), end, rel_tol=1e-3, abs_tol=2e-3 * reach * error), pointer
            assert rounded(text, float(attributes["value"])), (pointer, text)
            yield pointer


def _windows(manifest: Mapping[str, Any], pointer: str) -> int:
    evaluation, artifact = manifest["evaluation"], manifest["artifacts"][int(pointer.split("/")[2])]
    scored = artifact["verification"]["tokens_scored"]
    return int(scored * evaluation["windows"] / evaluation["tokens_scored"])
