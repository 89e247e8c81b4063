"""Makes `export.json`: inputs, recipe, outputs and verdicts. It has no time, path or host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact.input_records import describe_inputs, model_files
from exporter.backends.base import Finding
from exporter.backends.output_plan import OutputPlan
from exporter.plan.as_json import type_shares
from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.tokens.windows import CalibrationWindows, Windows
from exporter.verify.gate import Verification
from exporter.verify.results_json import evaluation_json, verification_json
from exporter.verify.weights.as_json import tensor_figures, weights_json
from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.backends.base import WriteResult


SCHEMA_VERSION = 1
_PACKAGES = ("torch", "transformers", "peft", "gguf", "llama-cpp-python", "safetensors", "tokenizers", "numpy")


def input_files(plan: ExportPlan) -> list[tuple[str, Path]]:
    """Every file of the inputs that decides the outputs: its role (`base`, `adapter`, `adapter.1`, …) and its path."""
    files, base = model_files(plan.model), plan.base.folder
    files += [("base", base / name) for name in ("generation_config.json", "README.md") if (base / name).is_file()]
    known = {path for _, path in files}
    carried = {path: None for artifact in plan.artifacts for path in artifact.copies.values() if path not in known}
    return files + [("base", path) for path in carried]


def build_manifest(
    plan: ExportPlan,
    folder: FolderPlan,
    inputs: Mapping[Path, str],
    outputs: Mapping[str, tuple[int, str]],
    written: Mapping[str, WriteResult],
    verdicts: Mapping[str, Verification],
    device: str,
    drawn: Windows | None = None,
) -> dict[str, Any]:
    """The manifest of one output folder.

    Args:
        plan: the run's plan.
        folder: the folder that the manifest describes.
        inputs: hash of every input file.
        outputs: size and hash of every file of the folder, by name.
        written: the tour's result for each artifact, by its label.
        verdicts: by artifact label.
        device: the kind of device that computed the merge (`cpu` or `cuda`).
        drawn: evaluation windows that were drawn because a verdict was undecided.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "exporter": __version__,
        "name": plan.model.name,
        "inputs": describe_inputs(plan.base, plan.adapters, plan.model, input_files(plan), inputs),
        "recipe": _recipe(plan, folder),
        "merge": {
            "device": device,
            "parameters": plan.model.parameters,
            "tensors": len(plan.model.tensors),
            "tensors_updated": plan.model.updated,
            "untied": plan.model.untied,
            "tokenizer_from": plan.model.tokenizer.origin,
        },
        "versions": {package: version(package) for package in _PACKAGES},
        "evaluation": evaluation_json(plan.tokens.evaluation, drawn),
        "calibration": _calibration(plan.tokens.calibration),
        "artifacts": [
            _artifact(artifact, outputs, written[artifact.label], verdicts.get(artifact.label))
            for artifact in folder.artifacts
        ],
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(outputs.items())},
    }


def _recipe(plan: ExportPlan, folder: FolderPlan) -> dict[str, Any]:
    """The recipe with every default resolved. Folders have only their names."""
    recipe = plan.recipe
    return {
        "base": plan.base.hub_id or plan.base.name,
        "adapters": [source.hub_id or source.name for source in plan.adapters],
        "format": folder.backend.name,
        "quant": [artifact.quant for artifact in folder.artifacts],
        "options": {key: _without_folder(value) for key, value in folder.options.items()},
        "verify": recipe.verify,
        "compute_dtype": recipe.compute_dtype,
        "calibration": {
            "text": recipe.calibration.name,
            "tokens": recipe.calibration.tokens,
            "window": recipe.calibration.window,
            "seed": recipe.calibration.seed,
        },
        "evaluation": {
            "tokens": recipe.evaluation.tokens,
            "max_tokens": recipe.evaluation.max_tokens,
            "n_ctx": recipe.evaluation.n_ctx,
            "gate": recipe.evaluation.model_dump()["gate"],
            "answers": recipe.evaluation.answers,
        },
    }


def _calibration(windows: CalibrationWindows | None) -> dict[str, Any] | None:
    if windows is None:
        return None
    return {
        "source": windows.source,
        "windows": len(windows.ids),
        "window": windows.window,
        "tokens": windows.tokens,
        "seed": windows.seed,
        "sha256": windows.sha256,
    }


def _without_folder(value: Any) -> Any:
    """A value of an option. A path becomes its name."""
    return Path(value).name if isinstance(value, Path) or (isinstance(value, str) and "/" in value) else value


def _artifact(
    artifact: OutputPlan,
    outputs: Mapping[str, tuple[int, str]],
    written: WriteResult,
    verdict: Verification | None,
) -> dict[str, Any]:
    names = artifact.names(written.made.names)
    weights = verdict.weights if verdict else None
    figures = tensor_figures(weights)
    return {
        "format": artifact.format,
        "quant": artifact.quant,
        "entry": artifact.entry,
        "runtimes": list(artifact.runtimes),
        "bytes": sum(outputs[name][0] for name in names),
        "files": names,
        "types": type_shares(artifact),
        "notes": [*artifact.notes, *written.made.notes],
        "tensors": [
            {"name": tensor.name, "type": tensor.type, "shape": list(tensor.shape)}
            | ({"wanted": tensor.fallback_from} if tensor.fallback_from else {})
            | figures.get(tensor.name, {})
            for tensor in artifact.tensors
        ],
        "checksums": {
            tensor.checksum_name: written.checksums[tensor.checksum_name]
            for tensor in artifact.tensors
            if tensor.checksum_name in written.checksums
        },
        "quantization": _quantization(written.findings),
        "weights": weights_json(weights),
        "verification": verification_json(verdict),
        "answers": verdict.answers.as_json() if verdict and verdict.answers else None,
    }


def _quantization(findings: Sequence[Finding]) -> dict[str, Any] | None:
    """Findings on the matrices that were solved for, those that were only rounded first; None if there were none."""
    if not findings:
        return None
    return {
        "matrices": len(findings),
        "rounded": [finding.name for finding in findings if finding.rounded],
        "damped_more": {finding.name: finding.damp for finding in findings if finding.attempts > 1},
        "dead_columns": sum(finding.dead for finding in findings),
        "losses": {finding.name: finding.loss for finding in findings},
        "tokens": {finding.name: finding.tokens for finding in findings},
    }
