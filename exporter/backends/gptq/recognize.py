"""Recognizes a GPTQ folder that came without a manifest, and the kinds of its packed weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from exporter.backends.gptq.bit_unpacking import PARTS, bits_of, parts_of
from exporter.backends.gptq.names import QUANTS, WORD_BITS, quant_name
from exporter.backends.model_folder.recognize import ModelFolder
from exporter.backends.recognized import Recognized
from exporter.errors import ArtifactError, ExporterError
from exporter.families.roles import experts_of
from exporter.inputs.checkpoint import StoredTensor, read_header, read_json
from exporter.runtimes.artifact_facts import PackedWeights


def recognize_folder(path: Path) -> Recognized | None:
    """What is known of a model folder with GPTQ weights; None for a file, and for a folder without a quantization.

    Raises:
        ArtifactError: the folder has another quantization, or it holds no tensors.
        CheckpointError: the configuration or a header cannot be read.
    """
    if not path.is_dir():
        return None
    quantization = read_json(path / "config.json").get("quantization_config")
    if quantization is None:
        return None
    folder = ModelFolder.read(path)
    quant = _quant(quantization) if isinstance(quantization, dict) else None
    if quant is None:
        raise ArtifactError(
            "config.json: quantization_config", found=json.dumps(quantization)[:100], expected="GPTQ, or none",
            remedy="Only what this program writes has limits.",
        )  # fmt: skip
    return folder.recognized(quant, sum(_parameters(name, one, quantization) for name, one in folder.tensors.items()))


def _quant(quantization: Mapping[str, Any]) -> str | None:
    """The type that a configuration names; None if it names none that has limits."""
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if quantization.get("quant_method") != "gptq" or not (isinstance(bits, int) and isinstance(group_size, int)):
        return None
    name = quant_name(bits, group_size)
    return name if name in QUANTS else None


def _parameters(name: str, tensor: StoredTensor, quantization: Mapping[str, Any]) -> int:
    """Weights that a stored tensor stands for."""
    if name.endswith(".qweight"):
        return prod(tensor.shape) * WORD_BITS // int(quantization["bits"])
    return 0 if name.endswith(tuple(f".{part}" for part in PARTS)) else prod(tensor.shape)


def packed_weights(entry: Path) -> frozenset[PackedWeights]:
    """Every kind of GPTQ weights in a model folder.

    By the shapes of its tensors: the configuration may have bits that no layer has, where rules override it for all.
    Where these cannot be read, and there are none, by the configuration. Empty for what has no such weights, and for
    what cannot be read, as whoever loads it will say.
    """
    try:
        config = json.loads((entry / "config.json").read_bytes())["quantization_config"]
        rules = (config.get("dynamic") or {}).values()
        said = frozenset(int(one["bits"]) for one in (config, *rules) if "bits" in one)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return frozenset()
    unread = frozenset(PackedWeights("gptq", bits) for bits in said)
    try:
        stored = {name: one.shape for file in entry.glob("*.safetensors") for name, one in read_header(file).items()}
        modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
        # Without its indices a layer's shapes do not tell.
        bits = {module: bits_of(parts_of(stored, module), max(said, default=0)) for module in modules}
    except (ExporterError, IndexError, ZeroDivisionError):
        return unread
    found = frozenset(PackedWeights("gptq", bits[module], bool(experts_of(f"{module}.weight"))) for module in modules)
    return found or unread
