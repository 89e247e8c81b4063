"""Unpack a GPTQ folder into plain float32 weights, by the description of the format alone.

    python -m scripts.oracles.unpack_gptq GPTQ_FOLDER TARGET

TARGET is a model folder that transformers loads, so that perplexities of packed and unpacked weights can be compared.
What unpacks a layer, and describes the format, is exporter/backends/gptq/bit_unpacking.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from exporter.backends.gptq.bit_unpacking import PARTS, bits_of, unpack_layer

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

SHARD_BYTES = 4 << 30
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BF16": np.uint16,
}  # fmt: skip


class FormatError(ValueError):
    """What was read contradicts the format."""


# --- a folder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> Array:
        """The tensor; bfloat16 as float32."""
        count = int(np.prod(self.shape))
        found: Array = np.fromfile(self.file, _DTYPES[self.dtype], count, offset=self.start).reshape(self.shape)
        return (found.astype(np.uint32) << 16).view(np.float32) if self.dtype == "BF16" else found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start)
    return found


def quantization_config(folder: Path) -> dict[str, Any]:
    """The folder's `quantization_config`, out of config.json or quantize_config.json."""
    config = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config")
    beside = folder / "quantize_config.json"
    if config is None and beside.is_file():
        config = json.loads(beside.read_text("utf-8"))
    if not isinstance(config, dict) or config.get("quant_method", "gptq") != "gptq":
        raise FormatError(f"{folder} is no GPTQ folder")
    return config


def unpacked_tensors(folder: Path) -> Iterator[tuple[str, Floats]]:
    """Every weight of a GPTQ folder as float32, by the name that it has in the model it was made from."""
    config, stored = quantization_config(folder), stored_tensors(folder)
    written = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if module not in packed or part not in PARTS:
            yield name, tensor.read().astype(np.float32)
        elif part == "qweight":
            parts = {key: stored[f"{module}.{key}"].read() for key in PARTS if f"{module}.{key}" in stored}
            bits = bits_of({key: part.shape for key, part in parts.items()}, int(config["bits"]))
            yield f"{module}.weight", unpack_layer(parts, bits, int(config["group_size"]), written)


def unpack_folder(folder: Path, target: Path) -> int:
    """Write a float32 model folder; returns the number of layers that were unpacked."""
    target.mkdir(parents=True)
    layers = sum(name.endswith(".qweight") for name in stored_tensors(folder))
    places: dict[str, str] = {}
    shard: dict[str, Floats] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weights in unpacked_tensors(folder):
        shard[name] = weights
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
    weights_and_ours = ("*.safetensors", "*.index.json", "config.json", "quantize_config.json", "export.json")
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in weights_and_ours):
            shutil.copyfile(file, target / file.name)
    return layers


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a GPTQ folder")
    parser.add_argument("target", type=Path, help="the folder to make")
    arguments = parser.parse_args()
    print(f"{unpack_folder(arguments.folder, arguments.target)} layers unpacked into {arguments.target}")


if __name__ == "__main__":
    main()
