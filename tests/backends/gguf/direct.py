"""A base without adapters as a GGUF file, by the backend's plan and writer alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from exporter.backends.gguf.backend import GgufBackend, open_file
from exporter.backends.gguf.imatrix.file import Floats
from exporter.backends.gguf.imatrix.plan import GgufPlan


def write_gguf(base: Path, plan: GgufPlan, folder: Path, importance: Mapping[str, Floats] | None = None) -> Path:
    """Write a planned file and its documents into a folder; returns the file.

    The importance is the plan's own unless one is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(base / "model.safetensors")
    backend = GgufBackend()
    if importance is None:
        writer = backend.open(plan, folder, resume=False)
    else:
        writer = open_file(plan, folder, importance, resume=False)
    for tensor in plan.tensors:
        rows = torch.cat([tensors[source].to(torch.float32).reshape(-1, tensor.columns) for source in tensor.sources])
        # In two blocks, as they may come.
        half = tensor.rows // 2
        for first, block in ((half, rows[half:]), (0, rows[:half])):
            if len(block):
                writer.write(tensor, first, block)
    writer.close()
    for name, content in plan.documents.items():
        (folder / name).write_bytes(content)
    return folder / plan.entry
