"""Describes the inputs for `export.json` and `reference.json`: their source, and the hash of every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.inputs.checkpoint import INDEX_NAME
from exporter.inputs.sources import Source
from exporter.merge.model import MergedModel


def role_of(adapter: int) -> str:
    """The role of an adapter by its place in the order in which they are added: `adapter`, `adapter.1`, …"""
    return "adapter" if adapter == 0 else f"adapter.{adapter}"


def model_files(model: MergedModel) -> list[tuple[str, Path]]:
    """Every file that decides the trained model or how it reads text.

    Gives the role of each (`base`, `adapter`, `adapter.1`, …) and its path."""
    base = model.base.folder
    files = [("base", base / name) for name in ("config.json", INDEX_NAME) if (base / name).is_file()]
    files += [("base", shard) for shard in model.base.shards]
    for index, adapter in enumerate(model.adapters):
        files += [(role_of(index), file) for file in adapter.files]
    for path in model.tokenizer.files.values():
        owner = next((role_of(i) for i, a in enumerate(model.adapters) if path.parent == a.folder), "base")
        files.append((owner, path))
    return files


def describe_inputs(
    base: Source,
    adapters: Sequence[Source],
    model: MergedModel,
    files: Sequence[tuple[str, Path]],
    hashes: Mapping[Path, str],
) -> list[dict[str, Any]]:
    """The base, then the adapters in their order, as JSON.

    Args:
        base: the base's source.
        adapters: the adapters' sources.
        model: the merged model.
        files: the files to name, with their roles.
        hashes: SHA-256 of each of them.
    """
    by_role: dict[str, list[dict[str, Any]]] = {}
    for role, path in files:
        by_role.setdefault(role, []).append({"name": path.name, "bytes": path.stat().st_size, "sha256": hashes[path]})
    described = [{"role": "base", **_source(base), "files": by_role["base"]}]
    for index, (source, adapter) in enumerate(zip(adapters, model.adapters, strict=True)):
        described.append(
            {
                "role": "adapter",
                **_source(source),
                "adapter": adapter.summary,
                "files": by_role[role_of(index)],
            }
        )
    return described


def _source(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {"name": source.name}
    if source.hub_id:
        found |= {"hub_id": source.hub_id, "revision": source.revision}
    return found
