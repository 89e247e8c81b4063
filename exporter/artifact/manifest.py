"""`export.json`: what went in, what was asked for, what came out, and how it scored. No time, path or host in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact.inputs import describe_inputs, model_files
from exporter.artifact.reading import MANIFEST_NAME as MANIFEST_NAME
from exporter.backends.base import Finding, OutputPlan
from exporter.calibration import CalibrationWindows, Windows
from exporter.plan import ExportPlan, FolderPlan
from exporter.plan_json import type_shares
from exporter.verify.gate import Verification
from exporter.verify.limits import Gate
from exporter.verify.metrics import Profile, Spread
from exporter.verify.weights_json import tensor_figures, weights_json
from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.tour.drive import Written

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
    written: Mapping[str, Written],
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
        written: what the tour did for each artifact, by its label.
        verdicts: by artifact label.
        device: where the merge was computed (`cpu` or `cuda`).
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
    """The recipe with every default resolved; folders by name only."""
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
    """A value of an option; of a path the name alone."""
    return Path(value).name if isinstance(value, Path) or (isinstance(value, str) and "/" in value) else value


def evaluation_json(windows: Windows | None, drawn: Windows | None) -> dict[str, Any] | None:
    """What was scored as JSON, with what was drawn beside; None if nothing was."""
    if windows is None:
        return None
    return {
        "source": windows.source,
        "windows": len(windows.ids),
        "n_ctx": windows.n_ctx,
        "tokens_scored": windows.tokens_scored,
        "sha256": windows.sha256,
        "drawn": {"windows": len(drawn.ids), "tokens_scored": drawn.tokens_scored, "sha256": drawn.sha256}
        if drawn
        else None,
    }


def _artifact(
    artifact: OutputPlan,
    outputs: Mapping[str, tuple[int, str]],
    written: Written,
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
            tensor.source: written.checksums[tensor.source]
            for tensor in artifact.tensors
            if tensor.source in written.checksums
        },
        "quantization": _quantization(written.findings),
        "weights": weights_json(weights),
        "verification": verification_json(verdict),
        "answers": verdict.answers.as_json() if verdict and verdict.answers else None,
    }


def _quantization(findings: Sequence[Finding]) -> dict[str, Any] | None:
    """What became of the matrices that were solved for, those that were only rounded first of all; None if none was."""
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


def verification_json(verdict: Verification | None) -> dict[str, Any]:
    """A verdict as JSON; None means that verification was skipped on request."""
    if verdict is None:
        return {"verdict": "skipped"}
    figures = verdict.comparison
    if figures is None:
        return {
            "verdict": verdict.verdict,
            "runtime": verdict.runtime,
            "not_scored": verdict.not_scored,
            "gate": _gate(verdict.gate),
            "broken": list(verdict.broken),
        }
    return {
        "verdict": verdict.verdict,
        "runtime": verdict.runtime,
        "tokens_scored": figures.tokens_scored,
        "looks": list(verdict.looks),
        "perplexity": figures.perplexity,
        "perplexity_stderr": figures.perplexity_stderr,
        "reference_perplexity": figures.reference_perplexity,
        "delta": figures.delta,
        "delta_interval": _ends(figures.delta_interval),
        "delta_log": figures.delta_log,
        "delta_stderr": figures.delta_stderr,
        "delta_log_interval": _ends(figures.delta_log_interval),
        "same_top": figures.same_top,
        "same_top_stderr": figures.same_top_stderr,
        "same_top_interval": _ends(figures.same_top_interval),
        "probability_change": asdict(figures.probability_change),
        "probability_rms": asdict(figures.probability_rms),
        "kl_divergence": _spread(figures.divergence),
        "jensen_shannon": _spread(figures.jensen_shannon),
        "top_k_divergence": _spread(figures.top_k_divergence),
        "profile": _profile(figures.profile),
        "gate": _gate(verdict.gate),
        "checks": [
            {
                "name": check.name,
                "value": check.value,
                "interval": _ends(check.interval),
                "limit": _limit(check.limit),
                "kind": check.kind,
                "verdict": check.verdict,
            }
            for check in verdict.checks
        ],
        **({"not_answered": verdict.not_answered} if verdict.not_answered is not None else {}),
        "broken": list(verdict.broken),
    }


def _gate(gate: Gate) -> dict[str, Any]:
    return {
        "size_class": gate.size_class,
        "max_delta": gate.max_delta,
        "max_divergence": _limit(gate.max_divergence),
        "max_top_k_divergence": _limit(gate.max_top_k_divergence),
        "min_same_top": gate.min_same_top,
    }


def _spread(figures: Spread | None) -> dict[str, Any] | None:
    return None if figures is None else asdict(figures) | {"interval": _ends(figures.interval)}


def _limit(value: float) -> float | None:
    """JSON has no infinity: None is no limit."""
    return value if math.isfinite(value) else None


def _profile(profile: Profile | None) -> dict[str, Any] | None:
    if profile is None:
        return None
    return {key: value and [list(row) for row in value] for key, value in vars(profile).items()}


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def dump(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: one `tensors` entry a line, so that a diff of two manifests can be read."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return (text + "\n").encode()
