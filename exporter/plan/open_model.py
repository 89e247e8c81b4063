"""Resolves and opens base and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.adapters.adapter import Adapter
from exporter.inputs.checkpoint import Checkpoint
from exporter.inputs.sources import Source, resolve_adapter, resolve_base
from exporter.merge.model import MergedModel, plan_merge
from exporter.plan.resources import check_paths
from exporter.recipe import Inputs


def open_model(recipe: Inputs, outs: Sequence[Path]) -> tuple[Source, tuple[Source, ...], MergedModel]:
    """Resolve and open base and adapters, and check the folders that will be written.

    Returns:
        The base's source, the adapters' sources, and the merged model.

    Raises:
        RefusalError: see `exporter.errors`.
    """
    base_source = resolve_base(recipe.base)
    adapter_sources = tuple(resolve_adapter(source) for source in recipe.adapters)
    check_paths(recipe, outs, (base_source, *adapter_sources))
    base = Checkpoint.open(base_source.folder)
    adapters = tuple(Adapter.open(source.folder) for source in adapter_sources)
    name = recipe.name or "-".join(source.name for source in (base_source, *adapter_sources))
    return base_source, adapter_sources, plan_merge(base, adapters, name)


def open_trained(base: str, adapters: tuple[str, ...], name: str) -> MergedModel:
    """Open the trained model that base and adapters make. Its tensors are not read yet.

    Args:
        base: a folder or a hub id.
        adapters: likewise.
        name: the model's name.

    Raises:
        RefusalError: they cannot be read, or do not fit.
    """
    checkpoint = Checkpoint.open(resolve_base(base).folder)
    opened = tuple(Adapter.open(resolve_adapter(adapter).folder) for adapter in adapters)
    return plan_merge(checkpoint, opened, name)
