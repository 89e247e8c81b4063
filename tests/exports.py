"""Exports through the public API, and the check that a refusal leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file

from exporter import ExportResult, Recipe, RefusalError, export
from exporter.recipe import Execution, ReferenceRecipe
from exporter.reference.pack.make import make_reference
from tests.folders import hashes, listing

Refusal = TypeVar("Refusal", bound=RefusalError)


def recipe(base: Path, adapters: Sequence[Path], out: Path, **values: Any) -> Recipe:
    """A recipe with one output, safetensors and unverified unless said otherwise."""
    output: dict[str, Any] = {key: values.pop(key) for key in ("quant", "options") if key in values}
    output |= {"format": values.pop("format", "safetensors"), "out": out}
    settings = {"base": str(base), "adapters": [str(adapter) for adapter in adapters], "outputs": [output]}
    return Recipe.build(settings | {"verify": False} | values)


def export_to(
    out: Path,
    base: Path,
    *adapters: Path,
    device: str = "cpu",
    block_bytes: int = 4 << 20,
    threads: int | None = None,
    **values: Any,
) -> ExportResult:
    """Export to a folder."""
    execution = Execution(device=device, block_bytes=block_bytes, threads=threads)
    return export(recipe(base, adapters, out, **values), execution)


def pack_to(out: Path, base: Path, *adapters: Path, threads: int | None = None, **values: Any) -> Path:
    """Write a reference pack."""
    settings = {"base": str(base), "adapters": [str(adapter) for adapter in adapters], "out": out}
    make_reference(ReferenceRecipe.build(settings | values), Execution(device="cpu", threads=threads))
    return out


def merge_with_us(
    out: Path, base: Path, *adapters: Path, quant: str = "fp32", **values: Any
) -> dict[str, torch.Tensor]:
    """The merged tensors as the safetensors backend writes them."""
    export_to(out, base, *adapters, quant=quant, **values)
    return load_file(out / "model.safetensors")


def refused(error: type[Refusal], out: Path, base: Path, *adapters: Path, **values: Any) -> Refusal:
    """Export, and check that it is refused with exactly that error and that nothing is written or changed."""
    inputs = (base, *adapters)
    before, held = listing(out.parent), [hashes(folder) for folder in inputs]
    with pytest.raises(RefusalError) as caught:
        export_to(out, base, *adapters, **values)
    assert type(caught.value) is error, caught.value
    assert listing(out.parent) == before
    assert [hashes(folder) for folder in inputs] == held
    for part in (caught.value.thing, caught.value.found, caught.value.expected, caught.value.remedy):
        assert part
    assert caught.value.exit_status == 2
    return caught.value
