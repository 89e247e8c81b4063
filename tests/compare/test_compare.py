"""Folders side by side: figures as in their manifests, and words where figures do not compare."""

from __future__ import annotations

import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exporter.compare.compare import compare_folders
from exporter.compare.plot import plot_html, plot_svg
from exporter.compare.speed import Speed
from tests.commands import invoke
from tests.manifests import manifest_of


def write(folder: Path, manifest: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "export.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders that compare: one with two artifacts, one rejected."""
    rejected = manifest_of()
    rejected["artifacts"][0]["verification"] |= {"verdict": "failed", "delta": 0.4, "broken": ["x"]}
    rejected["files"]["demo-Q4_K_M.gguf"]["bytes"] = 2_000_000
    both = manifest_of(quants=("Q8_0", "Q4_K_M"))
    return [write(tmp_path / "good", both), write(tmp_path / "bad.rejected", rejected)]


def test_table_by_size(folders: list[Path]) -> None:
    result = invoke("compare", *folders)
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert [row.split()[:3] for row in rows] == [
        ["bad.rejected", "gguf", "Q4_K_M"], ["good", "gguf", "Q4_K_M"], ["good", "gguf", "Q8_0"],
    ]  # fmt: skip
    for text in ("2.9 MB", "+0.78% (+0.30% … +1.27%)", "0.00285 ± 0.00014", "94.3%", "99.64%", "passed"):
        assert text in rows[1]
    assert "failed" in rows[0]
    assert "tokens/s" not in header


def test_json(folders: list[Path]) -> None:
    found = json.loads(invoke("compare", *folders, "--json").stdout)
    assert found["warnings"] == []
    assert [artifact["bytes"] for artifact in found["artifacts"]] == [2_000_000, 2_898_816, 4_607_264]
    assert found["artifacts"][1]["scores"]["kl_divergence"]["mean"] == 0.002848


def test_a_speed_that_was_measured_has_columns(folders: list[Path]) -> None:
    one = {(folders[0], "gguf", "Q8_0"): Speed("llama.cpp 1", 1234.56, 41.25)}
    comparison = compare_folders(folders, one)
    assert [artifact.speed for artifact in comparison.artifacts] == [None, None, *one.values()]
    console = Console(record=True, width=200, file=io.StringIO())
    comparison.show(console)
    header, *rows, last = console.export_text().splitlines()
    assert "prompt tok/s" in header
    assert [row.split()[-2:] for row in rows] == [["-", "-"], ["-", "-"], ["1234.6", "41.2"]]
    assert last == "speed, one request at a time, in llama.cpp 1"


def test_other_tokens_are_warned_of(folders: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", manifest_of(tokens="f" * 64))
    (warning,) = compare_folders([*folders, other]).warnings
    assert warning.startswith("scored on different tokens")
    assert "other Q4_K_M on ffffffff…" in warning
    assert "warning scored on different tokens" in invoke("compare", *folders, other).stdout


def test_another_model_is_warned_of(folders: list[Path], tmp_path: Path) -> None:
    other = manifest_of()
    other["artifacts"][0]["verification"]["reference_perplexity"] = 12.5
    (warning,) = compare_folders([*folders, write(tmp_path / "other", other)]).warnings
    assert warning.startswith("held against different models")
    assert "12.5000 and 67.7744" in warning


def drawing(name: str, seen: dict[str, int], drawn: str | None = "d" * 64, first: str = "0" * 64) -> dict[str, Any]:
    """A run that drew windows; of each artifact, how many predictions were scored and so what the model's figure is."""
    manifest = manifest_of(name=name, quants=tuple(seen), tokens=first)
    manifest["evaluation"]["drawn"] = drawn and {"windows": 24, "tokens_scored": 6120, "sha256": drawn}
    for artifact, count in zip(manifest["artifacts"], seen.values(), strict=True):
        artifact["verification"] |= {"tokens_scored": count, "reference_perplexity": 67.7744 + count / 1000}
    return manifest


def test_windows_that_were_drawn_are_other_tokens_and_no_other_model(tmp_path: Path) -> None:
    one = write(tmp_path / "one", drawing("a", {"Q4_K_M": 8160, "Q8_0": 2040}))
    plain = write(tmp_path / "plain", drawing("a", {"Q8_0": 2040}, drawn=None))
    (warning,) = compare_folders([one, plain]).warnings
    assert warning == (
        "scored on different tokens, so that no figure of one compares with another's: one Q4_K_M on 00000000… and "
        "dddddddd… (8,160 predictions); one Q8_0, plain Q8_0 on 00000000… (2,040 predictions)"
    )
    # As many, but not the same: what is drawn depends on what was calibrated on.
    for drawn, count, warned in (("d" * 64, 8160, False), ("e" * 64, 8160, True), ("d" * 64, 4080, True)):
        other = write(tmp_path / f"{drawn[0]} {count}", drawing("a", {"Q4_K_M": count}, drawn))
        alone = write(tmp_path / f"{drawn[0]} {count} alone", drawing("a", {"Q4_K_M": 8160}))
        assert [text[:26] for text in compare_folders([alone, other]).warnings] == warned * [
            "scored on different tokens"
        ]


def test_another_model_is_warned_of_among_those_of_the_same_tokens(tmp_path: Path) -> None:
    folders = [write(tmp_path / "one", drawing("a", {"Q4_K_M": 8160, "Q8_0": 2040}))]
    other = drawing("b", {"Q4_K_M": 8160})
    other["artifacts"][0]["verification"]["reference_perplexity"] = 12.5
    tokens, model = compare_folders([*folders, write(tmp_path / "other", other)]).warnings
    assert tokens.startswith("scored on different tokens")
    assert model.startswith("held against different models")
    assert "12.5000 and 75.9344" in model


def coarse() -> dict[str, Any]:
    manifest = manifest_of(format_="gptq")
    scores = manifest["artifacts"][0]["verification"]
    scores |= {"top_k_divergence": scores["kl_divergence"] | {"k": 20}, "kl_divergence": None}
    return manifest


def test_the_top_k_form_is_warned_of_and_not_drawn_as_the_full_one(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare_folders([*folders, write(tmp_path / "served", coarse())])
    (warning,) = comparison.warnings
    assert "served Q4_K_M is in the top-k form" in warning
    assert "top 20: ≥ 0.00285" in invoke("compare", *folders, tmp_path / "served").stdout
    assert "|change of perplexity|" in plot_svg(comparison)
    assert "mean KL" in plot_svg(compare_folders(folders))


def test_skipped_and_undecided(tmp_path: Path) -> None:
    skipped, undecided = manifest_of(), manifest_of()
    skipped["artifacts"][0] |= {"verification": {"verdict": "skipped"}, "weights": None}
    skipped["evaluation"] = None
    undecided["artifacts"][0]["verification"] |= {"verdict": "undecided", "checks": [], "delta_interval": None}
    comparison = compare_folders([write(tmp_path / "a", skipped), write(tmp_path / "b", undecided)])
    assert [artifact.verdict for artifact in comparison.artifacts] == ["skipped", "undecided"]
    assert comparison.warnings == ("not verified: a Q4_K_M",)
    assert plot_svg(comparison).count("<circle") == 1


@pytest.mark.parametrize("content", [None, "", "[]", '{"artifacts": [1]}', '{"artifacts": [{"quant": "Q8_0"}]}'])
def test_what_is_no_artifact_folder_is_refused(folders: list[Path], tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "export.json").write_text(content)
    result = invoke("compare", *folders, folder)
    assert result.exit_code == 2
    assert "export.json" in result.stderr
    assert result.stdout == ""
    assert invoke("compare", tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize(
    "spoilt",
    [
        {"kl_divergence": {"median": 0.1}}, {"kl_divergence": 0.1}, {"kl_divergence": {"mean": "much"}},
        {"reference_perplexity": None}, {"reference_perplexity": "67"}, {"delta": None}, {"delta": "+1 %"},
        {"delta_interval": [0.1]}, {"delta_interval": 0.1}, {"same_top": "most"}, {"tokens_scored": "2040"},
        {"top_k_divergence": {"mean": 0.1}}, {"perplexity": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_figures_that_cannot_be_read_are_refused(folders: list[Path], spoilt: dict[str, Any]) -> None:
    file = folders[0] / "export.json"
    manifest = json.loads(file.read_text())
    manifest["artifacts"][0]["verification"] |= spoilt
    file.write_text(json.dumps(manifest))
    result = invoke("compare", *folders, "--out", folders[0] / "plot.svg")
    assert result.exit_code == 2
    assert "export.json" in result.stderr
    assert result.stdout == ""


def test_a_manifest_of_before_a_figure_was_there_is_refused_or_shown_without_it(folders: list[Path]) -> None:
    file = folders[0] / "export.json"
    manifest = json.loads(file.read_text())
    for name in ("tokens_scored", "same_top", "top_k_divergence"):
        del manifest["artifacts"][0]["verification"][name]
    file.write_text(json.dumps(manifest))
    assert invoke("compare", *folders).exit_code == 0
    del manifest["artifacts"][0]["verification"]["reference_perplexity"]
    file.write_text(json.dumps(manifest))
    assert invoke("compare", *folders).exit_code == 2


def test_plot(folders: list[Path], tmp_path: Path) -> None:
    for name in ("plot.svg", "plot.html"):
        assert invoke("compare", *folders, "--out", tmp_path / name).exit_code == 0
    svg = (tmp_path / "plot.svg").read_text()
    assert svg in (tmp_path / "plot.html").read_text()
    assert "prefers-color-scheme: dark" in svg
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"bad.rejected Q4_K_M", "good Q4_K_M", "good Q8_0", "mean KL (nats); the lower left is better"} <= {*texts}
    assert invoke("compare", *folders, "--out", tmp_path / "plot.png").exit_code == 2
    assert not (tmp_path / "plot.png").exists()


def test_points_that_coincide_have_labels_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"a<{number}>", manifest_of()) for number in range(12)]
    root = ElementTree.fromstring(plot_svg(compare_folders(folders)))
    labels = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if (e.text or "").startswith("a<")]
    assert len({(label.get("x"), label.get("y")) for label in labels}) == 12


def test_the_page_has_a_drawing_for_a_phone_in_which_all_labels_are_inside_and_apart(tmp_path: Path) -> None:
    """Of names that are longer than the screen is wide, the beginning and the type stay."""
    names = [f"{'a-very-long-name-of-a-folder-' * size}{number}" for number, size in enumerate((1, 2, 3, 1))]
    html = plot_html(
        compare_folders([write(tmp_path / name, manifest_of(quants=("Q8_0", "Q4_K_M"))) for name in names])
    )
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    drawings = [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", html, re.S)]
    assert [int((root.get("viewBox") or "").split()[2]) for root in drawings] == [760, 358]
    for root in drawings:
        width = float((root.get("viewBox") or "").split()[2])
        labels = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if (e.text or "").startswith("a-very")]
        assert [(one.text or "").split()[-1] for one in labels].count("Q8_0") == 4
        boxes = []
        for one in labels:
            wide, ends = 6.6 * len(one.text or ""), one.get("text-anchor") == "end"
            boxes.append((float(one.get("x", 0)) - wide * ends, float(one.get("y", 0)), wide))
        # Right of the numbers of the y axis, which end where the lines of the grid begin.
        grid = min(float(one.get("x1", 0)) for one in root.iter("{http://www.w3.org/2000/svg}line"))
        assert all(x >= grid and x + wide <= width for x, _, wide in boxes)
        for (x, y, wide), (other, below, wider) in combinations(boxes, 2):
            assert abs(y - below) >= 14 or x + wide < other or other + wider < x
        for mark in root.iter("{http://www.w3.org/2000/svg}circle"):
            at, height = float(mark.get("cx", 0)), float(mark.get("cy", 0))
            assert not any(x - 5 < at < x + wide + 5 and y - 13 < height < y + 5 for x, y, wide in boxes)


@pytest.mark.parametrize("delta", [0.0, sys.float_info.max])
def test_extremes_are_drawn(tmp_path: Path, delta: float) -> None:
    manifest = coarse()
    manifest["artifacts"][0]["verification"]["delta"] = delta
    ElementTree.fromstring(plot_svg(compare_folders([write(tmp_path / "a", manifest)])))
    ElementTree.fromstring(plot_svg(compare_folders([])))
