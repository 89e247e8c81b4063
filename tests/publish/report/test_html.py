"""The report says what is in the manifest, the verdict first, and nothing in it can do harm."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter.publish.report.html import report_html
from tests.publish.report.manifests import CASES, case
from tests.publish.report.page import Page, numbers, rounded

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = """<script>alert("x")</script>'"><img src=http://evil.example/x onerror=alert(1)>&amp;"""


NEAREST = ("relative_error", "group", "scale", "row_mean", "survival")


def page_of(name: str) -> Page:
    return Page.of(report_html(case(name)))


def test_the_cases_are_manifests() -> None:
    schema = json.loads((ROOT / "docs" / "export.schema.json").read_text(encoding="utf-8"))
    for name in CASES.keys() - {"undecided"}:
        jsonschema.Draft202012Validator(schema).validate(case(name))


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_the_manifests(name: str) -> None:
    manifest = case(name)
    page = Page.of(report_html(manifest))
    found = set(numbers(manifest, ((one.attributes, one.text) for one in page.elements)))
    # What one reads without pointing at a drawing.
    read = set(numbers(manifest, ((one.attributes, one.text) for one in page.all("data"))))
    for index, artifact in enumerate(manifest["artifacts"]):
        at, figures = f"/artifacts/{index}", artifact["verification"]
        expected = {f"{at}/bytes", *(f"{at}/types/{kind}/bytes" for kind in artifact["types"])}
        if "perplexity" in figures:
            expected.add(f"{at}/verification/perplexity")
            assert f"{at}/verification/probability_rms/value" in read
            expected |= {
                f"{at}/verification/profile/probability/{r}/{c}" for r in range(10) for c in range(10)
            }  # fmt: skip
        for form in ("kl_divergence", "top_k_divergence", "jensen_shannon"):
            if figures.get(form):
                parts = ("median", "p90", "p95", "p99", "largest")
                assert {f"{at}/verification/{form}/{part}" for part in parts} <= read
        if figures.get("kl_divergence"):
            expected.add(f"{at}/verification/jensen_shannon/mean")
            expected |= {f"{at}/verification/profile/kl_quantiles/{number}/1" for number in range(11)}
            expected |= {f"{at}/verification/profile/kl_along_window/{number}/1" for number in range(16)}
        if artifact["weights"]:
            expected |= {f"{at}/weights/layers/{layer}/relative_error" for layer in range(36)}
            expected |= {
                f"{at}/weights/{part}/{key}/{figure}"
                for part in ("layers", "kinds")
                for key, one in artifact["weights"][part].items()
                for figure in ("survival", "delta_error")
                if one[figure] is not None
            }
            assert artifact["weights"]["delta_error"] is None or f"{at}/weights/delta_error" in read
            for one in (*(f"worst/{rank}" for rank in range(3)), *(f"nearest/{name}" for name in NEAREST)):
                value, limit = (
                    f"{at}/weights/{one}/{part}"
                    for part in (("value" if one.startswith("nearest") else "relative_error"), "limit")
                )
                assert {value, limit, f"{value} of {limit}"} <= read
        if artifact["answers"]:
            expected |= {f"{at}/answers/tokenization/texts", f"{at}/answers/continuations/0/mean_shortfall"}
        assert expected <= found


@pytest.mark.parametrize("name", CASES)
def test_every_number_in_a_table_says_where_it_is_from(name: str) -> None:
    """Figures, answers, types: no number is typed in by the template."""
    page = page_of(name)
    cells = [one for one in page.all("td", "n") if any(character.isdigit() for character in one.text)]
    inside = [one for one in page.all("data") if any(parent.startswith("td ") for parent in one.inside)]
    assert len(cells) <= len(inside)
    assert all(
        one.attributes.keys() & {"data-at", "data-length-of", "data-error-at", "data-part-at"}
        for one in page.all("data")
    )


def test_intervals_and_limits_are_those_of_the_gates_checks() -> None:
    manifest = case("everything")
    found = {*numbers(manifest, ((e.attributes, e.text) for e in Page.of(report_html(manifest)).elements))}
    for check in range(3):
        at = f"/artifacts/0/verification/checks/{check}"
        assert {f"{at}/value", f"{at}/interval/0", f"{at}/interval/1", f"{at}/limit"} <= found
    assert not any(pointer.startswith("/artifacts/0/verification/gate") for pointer in found)


def test_a_limit_that_is_none_has_no_share() -> None:
    manifest = case("everything")
    weights = manifest["artifacts"][0]["weights"]
    weights["worst"][0]["limit"], weights["worst"][1]["limit"] = None, 0.0
    weights["worst"][2]["relative_error"] = None
    page = Page.of(report_html(manifest))
    found = {*numbers(manifest, ((one.attributes, one.text) for one in page.elements))}
    assert not [one for one in found if one.startswith("/artifacts/0/weights/worst/") and " of " in one]
    assert len([one for one in found if one.startswith("/artifacts/1/weights/worst/") and " of " in one]) == 3


@pytest.mark.parametrize(
    ("text", "value", "same"),
    [
        ("+0.78%", 0.00784, True), ("+0.79%", 0.00784, False), ("\N{MINUS SIGN}1%", -0.01, True),
        ("2.9 MB", 2_940_128, True), ("2.8 MB", 2_940_128, False), ("1.80e+308", 1.797e308, True),
        ("4,096", 4096, True), ("none", 1.0, False),
    ],
)  # fmt: skip
def test_the_check_of_numbers_finds_what_is_wrong(text: str, value: float, same: bool) -> None:
    assert rounded(text, value) == same


# --- the verdict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "artifacts"),
    [
        ("everything", "passed", ["passed", "passed"]),
        ("failed", "failed", ["passed", "failed"]),
        ("undecided", "undecided", ["undecided", "passed"]),
        ("not scored", "failed", ["passed", "failed"]),
        ("unverified", "skipped", ["skipped", "skipped"]),
    ],
)
def test_the_verdict_comes_first(name: str, folder: str, artifacts: list[str]) -> None:
    page = page_of(name)
    assert page.texts("p", "word") == [folder]
    assert [one.attributes["class"].split()[1] for one in page.all("article", "card")] == artifacts
    # Before anything but the name.
    assert page.elements.index(page.all("section", "verdict")[0]) < page.elements.index(page.all("table")[0])
    assert page.texts("title")[0] == f"model: {folder}"


def test_a_failed_folder_says_what_is_broken_and_about_what() -> None:
    manifest = case("failed")
    page = Page.of(report_html(manifest))
    broken = manifest["artifacts"][1]["verification"]["broken"]
    assert page.texts("span", "reason") == broken
    assert len(broken) == 4
    assert page.texts("span", "area") == ["scores", "scores", "weights", "answers"]
    assert page.texts("p", "sentence") == ["gguf Q8_0 (1 of 2 artifacts) breaks a limit: nothing was published."]
    assert page.elements.index(page.all("ul", "reasons")[0]) < page.elements.index(page.all("table")[0])


def test_what_could_not_be_scored_is_said_with_what_is_wrong_beside() -> None:
    manifest = case("not scored")
    page = Page.of(report_html(manifest))
    assert page.texts("span", "reason") == manifest["artifacts"][1]["verification"]["broken"]
    assert page.texts("span", "area") == ["weights", "scores"]
    assert page.texts("p", "sentence") == ["gguf Q8_0 could not be scored by what serves it: nothing was published."]
    assert page.texts("p", "diagnosis") == ["The files are not what base and adapter make."]
    assert "not scored by llama-cpp-python 1.2" in page.texts("article", "card")[1]
    manifest["artifacts"][1]["weights"] = None
    manifest["artifacts"][0]["verification"] |= {"verdict": "failed", "broken": ["a limit"]}
    page = Page.of(report_html(manifest, again=[]))
    assert page.texts("p", "sentence") == [
        "gguf Q8_0 could not be scored by what serves it, and gguf Q4_K_M fails: do not serve them."
    ]
    assert page.texts("p", "diagnosis")[1] == "What serves it cannot load it, or gives no numbers."


def test_the_sentence_counts_what_it_names() -> None:
    found = {name: page_of(name).texts("p", "sentence") for name in ("undecided", "unverified")}
    assert found["undecided"] == [
        "What was scored does not tell whether gguf Q4_K_M keeps every limit: nothing was published."
    ]
    assert found["unverified"] == ["gguf Q4_K_M and gguf Q8_0 were written and not verified."]
    both = case("undecided")
    both["artifacts"][1] |= {"verification": both["artifacts"][0]["verification"]}
    (sentence,) = Page.of(report_html(both)).texts("p", "sentence")
    assert "whether gguf Q4_K_M and gguf Q8_0 keep every limit: nothing was published." in sentence
    one = case("unverified")
    one["artifacts"] = one["artifacts"][:1]
    assert Page.of(report_html(one)).texts("p", "sentence") == ["gguf Q4_K_M was written and not verified."]


def test_what_was_drawn_is_in_the_provenance() -> None:
    manifest = case("everything")
    manifest["evaluation"]["drawn"] = {"windows": 24, "tokens_scored": 744, "sha256": "1" * 64}
    text = "".join(Page.of(report_html(manifest)).texts("section", "provenance"))
    assert "248 scored; 24 more drawn where a verdict was undecided, 744 scored" in text
    assert "drawn" not in "".join(page_of("everything").texts("section", "provenance"))


@pytest.mark.parametrize(
    ("survival", "broken", "said"),
    [
        (0.004, "weights", "as if it had been left out"),
        (1.99, "weights", "as if it had been applied twice"),
        (1.3, "weights", "not hold the adapter's change as it was trained"),
        (1.0, "weights", "The files are not what base and adapter make"),
        (None, "weights", "The files are not what base and adapter make"),
        (1.0, "scores", "The weights are what their type leaves, but the predictions are farther"),
        (1.0, "answers", "but answers otherwise"),
    ],
)
def test_a_failed_artifact_says_in_a_sentence_what_is_wrong(survival: float | None, broken: str, said: str) -> None:
    manifest = case("everything")
    one = manifest["artifacts"][0]
    one["weights"]["survival"] = survival
    reason = f"a reason about {broken}"
    one["verification"] |= {"verdict": "failed", "broken": [reason]}
    if broken != "scores":
        one[broken]["broken"] = [reason]
    (diagnosis,) = Page.of(report_html(manifest)).texts("p", "diagnosis")
    assert said in diagnosis


def test_what_passed_has_no_diagnosis() -> None:
    assert [page_of(name).texts("p", "diagnosis") for name in ("everything", "undecided", "unverified")] == [[]] * 3


def test_a_failure_beats_what_is_undecided() -> None:
    manifest = case("failed")
    manifest["artifacts"][0] = case("undecided")["artifacts"][0]
    assert Page.of(report_html(manifest)).texts("p", "word") == ["failed"]


def test_what_is_undecided_is_said_with_what_was_scored() -> None:
    reasons = page_of("undecided").texts("span", "reason")
    assert reasons == [
        *case("undecided")["artifacts"][0]["verification"]["broken"],
        "looked at after 124 and 248 predictions; more may decide (--max-eval-tokens)",
    ]
    assert len(reasons) == 2


def test_what_is_missing_is_left_out() -> None:
    texts = {name: "".join(page_of(name).texts("body")) for name in CASES}
    assert "KL of the top 20" in texts["without KL"]
    assert "there is no KL divergence to draw" in texts["without KL"]
    for name, part in (
        ("unverified", "Perplexity"), ("unverified", "Answers"), ("no adapter", "Delta survival 99"),
        ("everything", "Dead columns"),
    ):  # fmt: skip
        assert part not in texts[name], name
    assert "Nothing was scored" in texts["unverified"]
    assert "Dead columns" in texts["gptq"]
    assert "not finite" in texts["failed"]
    assert "3 tensors are stored as Q5_0: the shape does not allow Q4_K" in texts["everything"]


# --- harm ----------------------------------------------------------------------------------------------------------


def _hostile(value: Any, key: str = "") -> Any:
    """Everything that comes from an input or another package, made hostile."""
    if key == "checks":
        # The gate's own words and numbers.
        return value
    if isinstance(value, dict):
        spoilt = key in ("types", "layers", "kinds", "versions", "files", "options", "explained", "losses", "tokens")
        return {
            (f"{HOSTILE}{name}" if spoilt else name): _hostile(item, name)
            for name, item in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [_hostile(item, "" if isinstance(item, dict) else key) for item in value]
    if isinstance(value, str) and key not in ("verdict", "kind", "role", "runtimes", "evidence"):
        return HOSTILE + value
    return value


@pytest.mark.parametrize("name", ["everything", "failed", "gptq"])
def test_names_and_notes_cannot_do_harm(name: str) -> None:
    page = Page.of(report_html(_hostile(case(name))))
    assert [one.tag for one in page.elements] == [one.tag for one in page_of(name).elements]
    assert not {"script", "img"} & {one.tag for one in page.elements}
    assert not any(key.startswith("on") for one in page.elements for key in one.attributes)
    assert HOSTILE.split("'")[0] in page.texts("h1")[0]


@pytest.mark.parametrize("name", CASES)
def test_it_needs_nothing_else(name: str) -> None:
    text = report_html(case(name)).decode()
    page = Page.of(text.encode())
    assert "url(" not in text
    assert "@import" not in text
    links = [one.attributes[key] for one in page.elements for key in ("src", "href") if key in one.attributes]
    assert all(link == "data:," or link.startswith("#artifact-") for link in links)
    (policy,) = [one for one in page.all("meta") if one.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")


@pytest.mark.parametrize("name", CASES)
def test_it_is_a_function_of_the_manifest(name: str) -> None:
    manifest = case(name)
    before = copy.deepcopy(manifest)
    html = report_html(manifest)
    assert html == report_html(json.loads(json.dumps(manifest)))
    assert manifest == before
    assert not re.search(rb"\d{4}-\d\d-\d\d|\d\d:\d\d", html)
