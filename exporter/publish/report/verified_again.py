"""The page of a new verification: the folder's manifest with the new findings in place of the old."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.errors import ArtifactError, OutputExistsError, RecipeError
from exporter.publish.report.html import report_html
from exporter.verify.gate import Verification
from exporter.verify.published.manifest_record import read_manifest
from exporter.verify.published.without_manifest import is_bare
from exporter.verify.results_json import verification_json
from exporter.verify.weights.as_json import tensor_figures, weights_json
from exporter.verify.weights.check import WeightsResult


def check_report(file: Path, folder: Path, *, force: bool) -> None:
    """Check that a report replaces none of the folder's files, and no other file without `force`.

    Args:
        file: the page's path.
        folder: the folder that is verified.
        force: whether a file that exists may be replaced.

    Raises:
        ArtifactError: the folder has no manifest.
        RecipeError: `folder` is an artifact by itself.
        OutputExistsError: the file exists, is one of the folder's own, or its folder is missing.
    """
    if is_bare(folder):
        raise RecipeError(
            "--report", found=f"{folder.name} without an export.json, which the page is made from",
            expected="a published folder", remedy="Leave --report out; --json has the figures.",
        )  # fmt: skip
    own = {(folder / name).resolve() for name in (MANIFEST_NAME, *read_manifest(folder).files)}
    found = None
    if file.resolve() in own:
        found = f"a file of {folder}, which is verified"
    elif os.path.lexists(file) and (not force or not file.is_file()):
        found = "a file that exists" if file.is_file() else "something that is no file"
    elif not file.parent.is_dir():
        found = f"no folder {file.parent}"
    if found:
        raise OutputExistsError(
            f"--report {file}",
            found=found,
            expected="a file that does not exist yet, in a folder that does",
            remedy="Choose another path; --force replaces a file that is not the folder's own.",
        )


def scored_page(
    folder: Path, verdicts: Mapping[str, Verification], evaluation: Mapping[str, Any] | None, notes: Sequence[str]
) -> bytes:
    """The page of artifacts that were scored again.

    Args:
        folder: the folder that was verified.
        verdicts: by artifact label.
        evaluation: the scored tokens, as in a manifest.
        notes: notes for the reader.
    """
    found = {
        label: _artifact(verification_json(one), one.weights, one.answers.as_json() if one.answers else None)
        for label, one in verdicts.items()
    }
    return _page(folder, found, evaluation, notes)


def files_page(folder: Path, weights: Mapping[str, WeightsResult | None], broken: Mapping[str, Sequence[str]]) -> bytes:
    """The page of artifacts whose files were compared and not scored.

    Args:
        folder: the folder that was verified.
        weights: findings on the stored weights, by artifact label; None if nothing can read them back.
        broken: faults in words, by artifact label.
    """
    found = {label: _artifact(_unscored(broken[label]), one, None) for label, one in weights.items()}
    return _page(folder, found, None, ["Files were held against base and adapter; nothing was scored."])


def refused_page(folder: Path, error: ArtifactError) -> bytes:
    """The page of a folder that was changed after publishing: every artifact with the changed file has failed.

    Args:
        folder: the folder that was verified.
        error: names the file and its fault.
    """
    reason = f"{error.thing}: {error.found}, published were {error.expected}"
    artifacts = json.loads((folder / MANIFEST_NAME).read_bytes())["artifacts"]
    at_fault = [one for one in artifacts if error.thing in one.get("files", ())] or artifacts
    found = {_label(one): _artifact(_unscored([reason] if one in at_fault else []), None, None) for one in artifacts}
    return _page(folder, found, None, ["The files are not those that were published, so nothing was scored."])


def _label(artifact: Mapping[str, Any]) -> str:
    return f"{artifact['format']} {artifact['quant']}"


def _unscored(broken: Sequence[str]) -> dict[str, Any]:
    return {"verdict": "failed", "broken": list(broken)} if broken else {"verdict": "skipped"}


def _artifact(
    verification: dict[str, Any], weights: WeightsResult | None, answers: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "verification": verification,
        "weights": weights_json(weights),
        "answers": answers,
        "figures": tensor_figures(weights),
    }


def _page(
    folder: Path,
    found: Mapping[str, dict[str, Any]],
    evaluation: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> bytes:
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    artifacts = []
    for artifact in manifest["artifacts"]:
        now = dict(found[_label(artifact)])
        figures = now.pop("figures")
        tensors = [
            {key: value for key, value in tensor.items() if key not in ("relative_error", "survival")}
            | figures.get(tensor["name"], {})
            for tensor in artifact["tensors"]
        ]
        artifacts.append({**artifact, **now, "tensors": tensors})
    return report_html({**manifest, "evaluation": evaluation, "artifacts": artifacts}, again=notes)
