"""The report in Chromium: nothing is fetched, nothing complains, nothing is wider than the screen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from exporter.compare.compare import compare_folders
from exporter.compare.plot import plot_html
from exporter.publish.report.html import REPORT_NAME, report_html
from tests.exports import export_to
from tests.manifests import manifest_of
from tests.publish.report.manifests import case
from tests.publish.report.page import numbers

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Every element that stands for a number, as one reads it.
SHOWN = """() => [
    ...document.querySelectorAll("[data-at], [data-length-of], [data-error-at], [data-part-at]")
].map(one => [
    Object.fromEntries([...one.attributes].map(attribute => [attribute.name, attribute.value])), one.textContent
])"""
# Elements that stand out of the screen and are not in a box that scrolls by itself.
OUTSIDE = """() => [...document.querySelectorAll("body *")].filter(one =>
    one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll, pre, svg, details:not([open])")
).map(one => one.outerHTML.slice(0, 120))"""

# Drawings that are shown: where they begin, and how large their letters are on the screen.
BOXES = """() => [...document.querySelectorAll("svg")].filter(one => one.getClientRects().length).map(one => ({
    left: one.getBoundingClientRect().left,
    letters: parseFloat(getComputedStyle(one).fontSize) * one.getBoundingClientRect().width / one.viewBox.baseVal.width
}))"""
# Milliseconds that a busy machine may take to open a page.
PATIENCE = 180_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: make browser")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        launched: Browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def folders(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo, published and rejected; and what it does not come to: GPTQ's findings, no verdict, long names."""
    parent = tmp_path_factory.mktemp("reports")
    inputs = (demo / "base", demo / "adapter")
    evaluation: dict[str, Any] = {"tokens": 2048, "n_ctx": 256}
    passed = export_to(
        parent / "passed", *inputs, format="gguf", quant=("Q4_K_M", "Q8_0"), verify=True, evaluation=evaluation
    )
    strict = evaluation | {"gate": {"Q4_0": 0.0001}}
    failed = export_to(parent / "failed", *inputs, format="gguf", quant=("Q4_0",), verify=True, evaluation=strict)
    assert (passed.passed, failed.passed) == (True, False)
    found = {"passed": parent / "passed", "failed": parent / "failed.rejected"}
    for name in ("gptq", "undecided"):
        manifest = case(name)
        manifest["name"] = "a-rather-long-name-of-a-model" * 4
        manifest["artifacts"][0]["notes"] = ["x" * 400]
        found[name] = parent / name
        found[name].mkdir()
        (found[name] / "export.json").write_text(json.dumps(manifest))
        (found[name] / REPORT_NAME).write_bytes(report_html(manifest))
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["passed", "failed", "gptq", "undecided"])
def test_it_opens(browser: Browser, folders: dict[str, Path], name: str, width: int, scheme: Any) -> None:
    url = (folders[name] / REPORT_NAME).as_uri()
    manifest = json.loads((folders[name] / "export.json").read_text(encoding="utf-8"))
    said: list[str] = []
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    try:
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url, timeout=PATIENCE)
        verdict = page.locator(".verdict .word")
        assert verdict.inner_text().lower() == ("passed" if name == "gptq" else name)
        # The verdict, and what is broken, are on the first screen.
        box = page.locator(".reasons li" if name == "failed" else ".verdict .word").first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 800
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(OUTSIDE) == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert dark == (scheme == "dark")
        found = set(numbers(manifest, page.evaluate(SHOWN)))
        for index, artifact in enumerate(manifest["artifacts"]):
            at = f"/artifacts/{index}"
            assert {f"{at}/bytes", f"{at}/verification/perplexity", f"{at}/weights/survival"} <= found
            assert any(pointer.startswith(f"{at}/verification/profile/kl_quantiles") for pointer in found)
            assert artifact["verification"]["verdict"] in page.locator(".card").nth(index).inner_text()
    finally:
        page.close()
    assert said == []
    assert asked == [url]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_comparison_is_read_on_a_phone(browser: Browser, tmp_path: Path, width: int, scheme: Any) -> None:
    """One drawing is shown, no letter is small, and nothing touches the edge."""
    for name in ("one", "another-that-has-a-rather-long-name-for-a-phone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "export.json").write_text(json.dumps(manifest_of(quants=("Q8_0", "Q4_K_M"))))
    file = tmp_path / "plot.html"
    file.write_text(plot_html(compare_folders([tmp_path / "one", *tmp_path.glob("another*")])), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    try:
        page.goto(file.as_uri(), timeout=PATIENCE)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        boxes = page.evaluate(BOXES)
        assert len(boxes) == 1
        assert boxes[0]["left"] >= 16
        assert boxes[0]["letters"] >= 11.5
        grey = sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))))
        assert (grey < 100) == (scheme == "dark")
    finally:
        page.close()
