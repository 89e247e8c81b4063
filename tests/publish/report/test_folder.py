"""Every output folder has its report, and it is no part of what the manifest vouches for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.plan.reporter import Reporter
from exporter.publish.report.html import REPORT_NAME, report_html
from exporter.recipe import Calibration, Evaluation, Limits
from exporter.verify.published.verify import verify_published
from tests.exports import export_to
from tests.publish.report.page import Page, numbers

TEXT = Calibration(text=Path(__file__), tokens=128, window=64)
EVALUATION = Evaluation(tokens=128, n_ctx=64, gate={"*": 100.0}, answers=False)


@pytest.mark.parametrize(
    ("format_", "quant", "verdict"),
    [("gguf", ("F16",), "passed"), ("gguf", ("Q2_K", "F16"), "failed"), ("safetensors", ("fp32",), "skipped")],
)
def test_a_folder_has_its_report(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    format_: str,
    quant: tuple[str, ...],
    verdict: str,
) -> None:
    base = make_base("qwen2")
    adapter = make_adapter(base)
    strict = EVALUATION.model_copy(update={"gate": {"*": 100.0, "Q2_K": Limits(kl=0.0)}})
    evaluation = strict if verdict == "failed" else EVALUATION
    settings: dict[str, Any] = {"calibration": TEXT.model_dump(), "evaluation": evaluation.model_dump()}
    result = export_to(
        tmp_path / "out", base, adapter, format=format_, quant=quant, verify=verdict != "skipped", **settings
    )
    folder = result.folders[0].path
    manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    html = (folder / REPORT_NAME).read_bytes()
    assert html == report_html(manifest)
    assert REPORT_NAME not in manifest["files"]
    page = Page.of(html)
    assert page.texts("p", "word") == [verdict]
    assert len(list(numbers(manifest, ((one.attributes, one.text) for one in page.elements)))) > 10
    if verdict == "passed":
        # Nor does checking the folder again mind it, or its absence.
        for _ in range(2):
            verified = verify_published(
                folder, str(base), (str(adapter),), TEXT, EVALUATION, None, "cpu", Reporter()
            )  # fmt: skip
            assert verified.passed
            (folder / REPORT_NAME).unlink(missing_ok=True)
