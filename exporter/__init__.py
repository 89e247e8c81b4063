"""Merge a LoRA adapter into its Qwen base, write files that serve, and prove that they are still what was trained.

from exporter import Recipe, export

result = export(Recipe(base="Qwen/Qwen3-8B", adapters=("me/my-lora",), outputs=({"format": "gguf", "out": "out"},)))
assert result.passed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.errors import ExporterError, RefusalError
    from exporter.pipeline.export import export
    from exporter.pipeline.plan import make_plan
    from exporter.pipeline.result import ExportResult
    from exporter.plan.export_plan import ExportPlan
    from exporter.recipe import Calibration, Evaluation, Execution, Output, Recipe, ReferenceRecipe
    from exporter.reference.pack.make import make_reference

__all__ = [
    "Calibration",
    "Evaluation",
    "Execution",
    "ExportPlan",
    "ExportResult",
    "ExporterError",
    "Output",
    "Recipe",
    "ReferenceRecipe",
    "RefusalError",
    "__version__",
    "export",
    "make_plan",
    "make_reference",
]

_HOMES = {
    "export": "pipeline.export", "ExportResult": "pipeline.result", "make_plan": "pipeline.plan",
    "ExportPlan": "plan.export_plan", "Recipe": "recipe", "Output": "recipe", "Calibration": "recipe",
    "Evaluation": "recipe", "Execution": "recipe", "ReferenceRecipe": "recipe",
    "make_reference": "reference.pack.make", "ExporterError": "errors", "RefusalError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `exporter --help` waits for none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
