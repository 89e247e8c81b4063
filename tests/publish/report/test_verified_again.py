"""`exporter verify --report`: the page says what was found now, whatever the folder's own report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.errors import ArtifactError, OutputExistsError
from exporter.publish.report.html import REPORT_NAME
from exporter.publish.report.verified_again import check_report, refused_page
from tests.commands import invoke
from tests.exports import export_to
from tests.folders import copy, hashes, rehash
from tests.publish.report.page import Page, numbers

SCORED = {"tokens": 128, "n_ctx": 64, "answers": False}


@pytest.fixture(scope="session")
def inputs(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    base = make_base("qwen2")
    return base, make_adapter(base)


@pytest.fixture(scope="session")
def sound(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artifacts that passed; to be copied before it is changed."""
    out = tmp_path_factory.mktemp("again") / "out"
    settings: dict[str, Any] = {"verify": True, "calibration": {"text": Path(__file__)}, "evaluation": SCORED}
    assert export_to(out, *inputs, format="gguf", quant=("F32", "F16"), name="model", **settings).passed
    return out


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    """F16 with a matrix of zeros, in a manifest that fits: what its own report says is no longer so."""
    folder = copy(sound, tmp_path / "out")
    from gguf import GGUFReader

    file = folder / "model-F16.gguf"
    (tensor,) = (one for one in GGUFReader(file, "r+").tensors if one.name == "blk.1.ffn_up.weight")
    tensor.data[...] = 0
    del tensor
    rehash(folder / MANIFEST_NAME, file.name)
    assert Page.of((folder / REPORT_NAME).read_bytes()).texts("p", "word") == ["passed"]
    return folder


def verify(folder: Path, inputs: tuple[Path, Path], report: Path, *options: str) -> tuple[int, dict[str, Any], Page]:
    """Exit status, what is printed, and the page."""
    given: list[str | Path] = ["--base", inputs[0], "--adapter", inputs[1], "--report", report, "--json", *options]
    result = invoke("verify", folder, *given)
    return result.exit_code, json.loads(result.stdout or "{}"), Page.of(report.read_bytes())


def test_the_page_is_of_this_verification(
    broken: Path, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    before = hashes(broken)
    status, found, page = verify(broken, inputs, tmp_path / "now.html", "--no-answers")
    assert status == 3
    assert hashes(broken) == before
    assert page.texts("p", "word") == ["failed"]
    assert page.texts("p", "kind") == ["Verification report"]
    assert [one.attributes["class"].split()[1] for one in page.all("article", "card")] == ["passed", "failed"]
    assert page.texts("p", "sentence")[0].startswith("gguf F16 (1 of 2 artifacts) is not the model that was trained")
    assert page.texts("span", "reason") == found["gguf F16"]["broken"]
    assert any("mlp.up_proj" in reason for reason in page.texts("span", "reason"))
    # Every number is the manifest's, with what was found now in its place.
    manifest = json.loads((broken / MANIFEST_NAME).read_text())
    for artifact in manifest["artifacts"]:
        now = found[f"{artifact['format']} {artifact['quant']}"]
        artifact |= {"verification": now, "weights": now["weights"], "answers": now["answers"]}
    manifest["evaluation"] = now["evaluation"]
    assert len(set(numbers(manifest, ((one.attributes, one.text) for one in page.elements)))) > 50


def test_the_page_of_files_alone(broken: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    status, found, page = verify(broken, inputs, tmp_path / "now.html", "--files-only")
    assert status == 3
    assert page.texts("p", "word") == ["failed"]
    assert page.texts("span", "reason") == found["gguf F16"]["broken"]
    assert [one.attributes["class"].split()[1] for one in page.all("article", "card")] == ["skipped", "failed"]
    assert any("nothing was scored" in sentence for sentence in page.texts("p", "sentence"))


def test_the_page_of_files_alone_that_are_sound(sound: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    status, _, page = verify(sound, inputs, tmp_path / "now.html", "--files-only")
    assert status == 0
    assert "hold what they should" in page.texts("p", "sentence")[0]


def test_a_file_that_was_changed_after_publishing_has_a_page_too(
    sound: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copy(sound, tmp_path / "out")
    with (folder / "model-F16.gguf").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    status, _, page = verify(folder, inputs, tmp_path / "now.html")
    assert status == 2
    assert page.texts("p", "word") == ["failed"]
    assert page.texts("span", "area") == ["files"]
    assert page.texts("span", "reason")[0].startswith("model-F16.gguf: sha256")


def test_a_file_that_is_in_no_artifact_is_in_all(sound: Path) -> None:
    error = ArtifactError("other", found="no such file", expected="every file on record", remedy="Copy it again.")
    page = Page.of(refused_page(sound, error))
    assert [one.attributes["class"].split()[1] for one in page.all("article", "card")] == ["failed", "failed"]


def test_a_report_takes_the_place_of_nothing_unasked(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "out")
    (tmp_path / "kept.html").write_text("kept")
    (tmp_path / "link.html").symlink_to(folder / "model-F16.gguf")
    for file, force in [
        (tmp_path / "kept.html", False), (tmp_path, True), (tmp_path / "none" / "now.html", True),
        (folder / "export.json", True), (folder / "model-F16.gguf", True), (tmp_path / "link.html", True),
        (folder / REPORT_NAME, False),
    ]:  # fmt: skip
        with pytest.raises(OutputExistsError, match="--report"):
            check_report(file, folder, force=force)
    for file, force in [(tmp_path / "now.html", False), (tmp_path / "kept.html", True), (folder / REPORT_NAME, True)]:
        check_report(file, folder, force=force)
    with pytest.raises(ArtifactError):
        check_report(tmp_path / "now.html", tmp_path, force=False)
    refused = invoke("verify", folder, "--base", "nowhere", "--report", tmp_path / "kept.html")
    assert refused.exit_code == 2
    assert "--report" in refused.stderr
    assert (tmp_path / "kept.html").read_text() == "kept"
