"""Small GPTQ folders, made by rounding, and the independent reader of such folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.backends.gptq.bit_packing import CheckpointFormat, pack
from exporter.backends.gptq.solver.grid import Grid
from exporter.backends.gptq.solver.solver import dequantize, round_to_nearest
from exporter.libraries.gptqmodel import missing_packages
from scripts.oracles import unpack_gptq
from tests.models import make_base

needs_gptqmodel = pytest.mark.skipif(bool(missing_packages()), reason="no gptqmodel: run `make gptqmodel`")


def unpack_script() -> ModuleType:
    """scripts/oracles/unpack_gptq.py, which knows nothing of this package's writer."""
    return unpack_gptq


def make_gptq(
    folder: Path,
    family: str = "qwen2",
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    checkpoint_format: CheckpointFormat = "gptq",
) -> tuple[Path, Path]:
    """A GPTQ folder `packed` and a float32 folder `plain` of the same values, of a small model with random weights.

    Returns:
        Both folders.
    """
    base = make_base(folder / "base", family, dtype="float32", tied=False)
    packed: dict[str, torch.Tensor] = {}
    plain = load_file(base / "model.safetensors")
    for name, weight in list(plain.items()):
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        quantized = round_to_nearest(weight, Grid(bits, group_size, sym))
        stored = pack(quantized.codes, quantized.scales, quantized.zeros, quantized.g_idx, bits, checkpoint_format)
        module = name.removesuffix(".weight")
        packed |= {f"{module}.{part}": getattr(stored, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        plain[name] = dequantize(quantized).contiguous()
    config = json.loads((base / "config.json").read_text())
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": sym,
        "checkpoint_format": checkpoint_format,
        "lm_head": False,
    }
    _save(base, folder / "packed", packed, config | {"quantization_config": quantization})
    _save(base, folder / "plain", plain, config)
    return folder / "packed", folder / "plain"


def _save(base: Path, folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
