"""Recognizes a GGUF file that came without a manifest."""

from __future__ import annotations

from math import prod
from pathlib import Path

from exporter.backends.gguf.file_types import FILE_TYPES
from exporter.backends.gguf.header_reader import read_header
from exporter.backends.recognized import Recognized
from exporter.errors import ArtifactError


def recognize_file(path: Path) -> Recognized | None:
    """What the header of a file says; None for a folder.

    Raises:
        ArtifactError: it is no GGUF file, or its file type is none that the exporter writes.
    """
    if not path.is_file():
        return None
    header = read_header(path)
    quant = next((name for name, one in FILE_TYPES.items() if one.number == header.file_type), None)
    if quant is None:
        raise ArtifactError(
            path.name, found=f"file type {header.file_type}", expected=f"one of {', '.join(FILE_TYPES)}",
            remedy="Limits are by type: only these have any.",
        )  # fmt: skip
    return Recognized(
        quant=quant,
        entry=path.name,
        runtimes=("llamacpp",),
        parameters=sum(prod(tensor.shape) for tensor in header.tensors.values()),
        vocabulary=len(header.metadata.get("tokenizer.ggml.tokens") or ()),
        nbytes=path.stat().st_size,
    )
