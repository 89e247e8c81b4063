"""Recognizes a folder of floats that came without a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from exporter.backends.model_folder.recognize import ModelFolder
from exporter.backends.recognized import Recognized
from exporter.inputs.checkpoint import read_json


def recognize_floats(path: Path, dtypes: Mapping[str, str]) -> Recognized | None:
    """What is known of a model folder without a quantization; None for anything else.

    Args:
        path: a file or a folder.
        dtypes: the dtype in the words of safetensors, by the name of a type.

    Raises:
        ArtifactError: the folder holds no tensors.
        CheckpointError: the configuration or a header cannot be read.
    """
    if not path.is_dir() or read_json(path / "config.json").get("quantization_config") is not None:
        return None
    folder = ModelFolder.read(path)
    tensors = folder.tensors.values()
    sizes = {name: sum(one.nbytes for one in tensors if one.dtype == dtype) for name, dtype in dtypes.items()}
    return folder.recognized(max(sizes, key=lambda name: sizes[name]), sum(prod(one.shape) for one in tensors))
