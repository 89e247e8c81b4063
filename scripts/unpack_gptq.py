"""Unpack a GPTQ folder into plain float32 weights, by the description of the format alone.

    python scripts/unpack_gptq.py GPTQ_FOLDER TARGET

TARGET is a model folder that transformers loads, so that perplexities of packed and unpacked weights can be compared.
Nothing of the exporter is used, and numpy does the arithmetic: what this reads back is what the bytes say.

The format, of a linear layer with `in` inputs and `out` outputs:

    qweight  int32 (in * bits / 32, out)      each column is a stream of bits, lowest first: the codes of its inputs
    qzeros   int32 (groups, out * bits / 32)  each row likewise: the zero points of its outputs; `gptq` stores zero - 1,
                                              `gptq_v2` the zero itself
    scales   float16 (groups, out)
    g_idx    int32 (in)                       the group of each input; without it, groups are runs of `group_size`

    weight[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o])
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

PARTS = ("qweight", "qzeros", "scales", "g_idx")
SHARD_BYTES = 4 << 30
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BF16": np.uint16,
}  # fmt: skip


class FormatError(ValueError):
    """What was read contradicts the format."""


# --- one layer -------------------------------------------------------------------------------------------------------


def unpack_stream(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.int32]:
    """Read rows of words as streams of bits.

    Args:
        words: int32, shape (rows, n * bits / 32).
        bits: bits of a code.

    Returns:
        Codes, shape (rows, n).
    """
    stream = np.unpackbits(np.ascontiguousarray(words, dtype="<i4").view(np.uint8), axis=1, bitorder="little")
    if stream.shape[1] % bits:
        raise FormatError(f"{words.shape[1]} words do not hold whole codes of {bits} bits")
    codes: npt.NDArray[np.int32] = stream.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits, dtype=np.int32))
    return codes


def unpack_layer(parts: Mapping[str, Array], bits: int, group_size: int, checkpoint_format: str = "gptq") -> Floats:
    """The weights of one layer.

    Args:
        parts: its tensors by the names of `PARTS`; `g_idx` may be missing.
        bits: bits of a code.
        group_size: inputs in a group; -1 for all. Only used without g_idx.
        checkpoint_format: gptq or gptq_v2.

    Returns:
        float32, shape (out, in).

    Raises:
        FormatError: the tensors contradict each other, or a zero point cannot be told.
    """
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise FormatError(f"checkpoint format {checkpoint_format}")
    codes = unpack_stream(parts["qweight"].T, bits)
    outputs, inputs = codes.shape
    zeros = unpack_stream(parts["qzeros"], bits)
    scales = parts["scales"].astype(np.float32)
    if zeros.shape != scales.shape or scales.shape[1] != outputs:
        raise FormatError(f"zeros {zeros.shape} and scales {scales.shape} for {outputs} outputs")
    if checkpoint_format == "gptq":
        # Some readers add one within the bits, some carry into the neighbour: such a file has no one meaning.
        if (zeros == 2**bits - 1).any():
            raise FormatError("a stored zero point that overflows when one is added")
        zeros = zeros + 1
    size = inputs if group_size == -1 else group_size
    groups = parts["g_idx"] if "g_idx" in parts else np.arange(inputs) // size
    if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= scales.shape[0]:
        raise FormatError(f"g_idx of {groups.shape} up to {groups.max()} for {inputs} inputs, {scales.shape[0]} groups")
    weights: Floats = (scales[groups] * (codes.T - zeros[groups]).astype(np.float32)).T
    return np.ascontiguousarray(weights)


def bits_of(parts: Mapping[str, Array], default: int) -> int:
    """Bits of a layer's codes, as its shapes have it: rules may give a layer other bits than the model."""
    if "g_idx" not in parts:
        return default
    return int(parts["qweight"].shape[0] * 32 // parts["g_idx"].shape[0])


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
            bits = bits_of(parts, int(config["bits"]))
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
