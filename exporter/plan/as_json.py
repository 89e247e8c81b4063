"""The plan as JSON, and the parts of it that the plan's table and the manifest show."""

from __future__ import annotations

from collections import Counter
from typing import Any

from exporter.backends.output_plan import OutputPlan
from exporter.plan.export_plan import ExportPlan, FolderPlan
from exporter.tokens.windows import TokenSets


def describe(plan: ExportPlan) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "base": {"name": plan.base.name, "revision": plan.base.revision, "bytes": plan.input_bytes},
        "adapters": [
            {"name": source.name, "revision": source.revision, "targets": len(adapter.updates)}
            for source, adapter in zip(plan.adapters, plan.model.adapters, strict=True)
        ],
        "model": {
            "name": plan.model.name,
            "architecture": (plan.model.config.get("architectures") or [None])[0],
            "parameters": plan.model.parameters,
            "tensors": len(plan.model.tensors),
            "tensors_updated": plan.model.updated,
            "untied": plan.model.untied,
        },
        "outputs": [_describe_folder(folder) for folder in plan.folders],
        "tokens": _describe_tokens(plan.tokens),
        "reference": {
            "out": str(plan.pack.out),
            "dtype": plan.pack.dtype,
            "windows": {"first": len(plan.pack.windows.ids), "most": plan.pack.most},
            "bytes": plan.pack.nbytes,
            "files": [{"name": name, "bytes": nbytes} for name, nbytes in plan.pack.files.items()],
        }
        if plan.pack
        else None,
        "disk_bytes": plan.disk_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "memory_bytes": {"merge": plan.merge_bytes, "walk": plan.walk_bytes},
        "seconds": round(plan.seconds, 1),
        "threads": plan.threads,
        "device": plan.execution.device,
    }


def _describe_tokens(tokens: TokenSets) -> dict[str, Any]:
    evaluation, calibration = tokens.evaluation, tokens.calibration
    return {
        "evaluation": {"source": evaluation.source, "windows": len(evaluation.ids), "n_ctx": evaluation.n_ctx}
        if evaluation
        else None,
        "calibration": {
            "source": calibration.source,
            "windows": len(calibration.ids),
            "window": calibration.window,
            "seed": calibration.seed,
        }
        if calibration
        else None,
    }


def _describe_folder(folder: FolderPlan) -> dict[str, Any]:
    return {
        "out": str(folder.out),
        "artifacts": [
            {
                "format": artifact.format,
                "quant": artifact.quant,
                "entry": artifact.entry,
                "bytes": artifact.nbytes,
                "files": [{"name": file.name, "bytes": file.nbytes} for file in artifact.files]
                + [{"name": name, "bytes": len(content)} for name, content in artifact.documents.items()]
                + [{"name": name, "bytes": path.stat().st_size} for name, path in artifact.copies.items()]
                + [{"name": name, "bytes": nbytes} for name, nbytes in artifact.made.items()],
                "types": type_shares(artifact),
                "fallbacks": [
                    {"tensor": tensor.name, "wanted": tensor.fallback_from, "type": tensor.type}
                    for tensor in artifact.fallbacks
                ],
                "notes": list(artifact.notes),
                "verified_by": folder.runtimes.get(artifact.label),
            }
            for artifact in folder.artifacts
        ],
    }


def type_shares(artifact: OutputPlan) -> dict[str, dict[str, float]]:
    """Tensors, bytes and share of the bytes by type, the largest first."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in artifact.tensors:
        tensors[tensor.type] += 1
        nbytes[tensor.type] += tensor.nbytes
    total = sum(nbytes.values()) or 1
    return {
        kind: {"tensors": tensors[kind], "bytes": size, "share": round(size / total, 4)}
        for kind, size in nbytes.most_common()
    }
