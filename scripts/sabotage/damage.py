"""Damages a copy of an artifact on purpose: its tensors, metadata and JSON files. Makes the manifest fit.

Files are links to the sound artifact's until something in them changes, so that a large model does not fill the disk.
Hashes and sizes of changed files go into `export.json` again: this simulates a faulty exporter and not a faulty disk.
A fault of the encoder would be in the encoder's checksums too, so `export.json` has none. They stay if the fault comes
after the encoder.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.artifact.hashing import sha256
from exporter.backends.gguf.header_reader import read_header
from exporter.backends.gptq.bit_unpacking import parts_of

Array = npt.NDArray[Any]
Tensors = dict[str, torch.Tensor]
# Two bytes a bfloat16: numpy has no such type.
_DTYPES = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "I32": "<i4"}
_ONES = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored.

    Attributes:
        file: the file that holds it.
        kind: its type, as its format calls it.
        dtype: what its bytes are shown as.
        shape: of that.
        start: offset in bytes from the start of the file.
    """

    file: Path
    kind: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.start + prod(self.shape) * np.dtype(self.dtype).itemsize


class Damaged:
    """A copy of a published folder with one artifact.

    Args:
        files: the folder that the files are taken from.
        manifest: the manifest that it gets: of the sound artifact that it is passed off as.
        folder: where the copy is made.
        config: the base's configuration.
    """

    def __init__(self, files: Path, manifest: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config, self._source, self._manifest = folder, config, files, manifest
        artifact = manifest["artifacts"][0]
        self.format, self.entry = str(artifact["format"]), str(artifact["entry"])
        made = json.loads((files / MANIFEST_NAME).read_text("utf-8"))
        renamed = {made["artifacts"][0]["entry"]: self.entry}
        folder.mkdir(parents=True)
        for name in made["files"]:
            os.link(files / name, folder / renamed.get(name, name))
        self._known = {os.stat(files / name).st_ino: record for name, record in made["files"].items()}

    def publish(self, *, checksums: bool) -> None:
        """Write a manifest that fits the files.

        Args:
            checksums: whether it keeps those of the weights as they were encoded.
        """
        files = {}
        for path in sorted(self.folder.iterdir()):
            record = self._known.get(path.stat().st_ino)
            files[path.name] = record or {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {**self._manifest, "files": files}
        if not checksums:
            manifest["artifacts"] = [{**one, "checksums": {}} for one in manifest["artifacts"]]
        (self.folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")

    # --- files -------------------------------------------------------------------------------------------------------

    def own(self, file: Path) -> Path:
        """Make a file one that may be changed: a copy in the place of the link."""
        if file.stat().st_nlink > 1:
            copied = file.with_name(f"{file.name}.copy")
            shutil.copyfile(file, copied)
            copied.replace(file)
        return file

    def replace(self, name: str, source: Path) -> None:
        """Put another file in the place of one."""
        (self.folder / name).unlink()
        shutil.copyfile(source, self.folder / name)

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON file, if there is one."""
        if (self.folder / name).is_file():
            file = self.own(self.folder / name)
            values = json.loads(file.read_text("utf-8"))
            change(values)
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")

    @property
    def quantization(self) -> dict[str, Any]:
        """What config.json says of packed weights."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))["quantization_config"]
        return found

    @property
    def shards(self) -> list[Path]:
        """The files that hold tensors, in order."""
        if self.format == "gguf":
            return [self.folder / self.entry]
        return sorted(self.folder.glob("*.safetensors"))

    # --- tensors -----------------------------------------------------------------------------------------------------

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Every stored tensor, by the name that it is stored under."""
        found: dict[str, Place] = {}
        for file in self.shards:
            found |= _gguf_places(file) if self.format == "gguf" else _shard_places(file)
        return found

    def parts(self, weight: str) -> dict[str, str]:
        """Names under which a weight is stored: by part of a packed one, else as `weight` alone."""
        module = weight.removesuffix(".weight")
        if self.format == "gguf":
            architecture = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[self.config["model_type"]]
            names = gguf.get_tensor_name_map(architecture, int(self.config["num_hidden_layers"]))
            return {"weight": str(names.get_name(weight, try_suffixes=(".weight",)))}
        packed = parts_of(self.places, module)
        return {part: f"{module}.{part}" for part in packed or ["weight"]}

    def has(self, weight: str) -> bool:
        """Whether a weight is stored."""
        return next(iter(self.parts(weight).values())) in self.places

    def stored(self, weight: str) -> dict[str, Array]:
        """The parts of a weight as they are stored, to be changed in place.

        Of GGUF, bytes: shape (rows, bytes of a row). Of floats, their bits. Of packed weights, what the format says.
        """
        return {part: self._open(self.places[name]) for part, name in self.parts(weight).items()}

    def _open(self, place: Place) -> Array:
        return np.memmap(self.own(place.file), place.dtype, "r+", place.start, place.shape)

    def fill_with_ones(self, weight: str) -> None:
        """Set a tensor of floats to ones."""
        place = self.places[self.parts(weight)["weight"]]
        array = self._open(place)
        array.view(_DTYPES[place.kind])[...] = _ONES[place.kind]

    def misname(self, weight: str, old: str, new: str) -> None:
        """Store a weight under another name of the same length: under its own, it is missing."""
        name = self.parts(weight)["weight"]
        place = self.places[name]
        first = min(one.start for one in self.places.values() if one.file == place.file)
        with self.own(place.file).open("r+b") as stream:
            at = stream.read(first).index(name.encode())
            stream.seek(at)
            stream.write(name.replace(old, new).encode())

    def edit_tensors(self, shard: Path, change: Callable[[Tensors], object]) -> None:
        """Write a shard of safetensors again with other tensors."""
        tensors = load_file(shard)
        change(tensors)
        shard.unlink()
        save_file(tensors, shard, metadata={"format": "pt"})

    # --- GGUF metadata -----------------------------------------------------------------------------------------------

    def metadata_key(self, key: str) -> str:
        """A key of the architecture's own."""
        return f"{self.config['model_type']}.{key}"

    def has_key(self, key: str) -> bool:
        """Whether the metadata says anything of a key."""
        return key in gguf.GGUFReader(self.folder / self.entry).fields

    def set_number(self, key: str, value: float, index: int = 0) -> None:
        """Change a number of the metadata, or the one at a place of a list."""
        field = gguf.GGUFReader(self.own(self.folder / self.entry), "r+").fields[key]
        field.parts[field.data[index]][0] = value

    def text(self, key: str) -> str:
        """A text of the metadata."""
        return str(gguf.GGUFReader(self.folder / self.entry).fields[key].contents())

    def set_text(self, key: str, value: str) -> None:
        """Change a text of the metadata."""
        field = gguf.GGUFReader(self.folder / self.entry).fields[key]
        start = field.offset + sum(part.nbytes for part in field.parts[: field.data[0] - 1])
        old = field.parts[field.data[0]].nbytes
        encoded = value.encode()
        self._splice(start, 8 + old, struct.pack("<Q", len(encoded)) + encoded)

    def exchange_texts(self, key: str, first: int, second: int) -> None:
        """Exchange two texts of an array."""
        field = gguf.GGUFReader(self.folder / self.entry).fields[key]
        start = field.offset + sum(part.nbytes for part in field.parts[: field.data[0] - 1])
        texts = [field.parts[index].tobytes() for index in field.data]
        old = sum(8 + len(text) for text in texts)
        texts[first], texts[second] = texts[second], texts[first]
        self._splice(start, old, b"".join(struct.pack("<Q", len(text)) + text for text in texts))

    def _splice(self, start: int, old: int, new: bytes) -> None:
        """Put other bytes into the header; the data moves with its end."""
        file = self.own(self.folder / self.entry)
        reader = gguf.GGUFReader(file)
        end = max(one.field.offset + sum(part.nbytes for part in one.field.parts) for one in reader.tensors)
        with file.open("rb") as stream:
            header = stream.read(end)
            stream.seek(reader.data_offset)
            header = header[:start] + new + header[start + old :]
            moved = file.with_name(f"{file.name}.copy")
            with moved.open("wb") as target:
                target.write(header + bytes(-len(header) % reader.alignment))
                shutil.copyfileobj(stream, target)
        moved.replace(file)


def _gguf_places(file: Path) -> dict[str, Place]:
    return {
        name: Place(file, one.type, "u1", (prod(one.shape[:-1]), one.row_bytes), one.start)
        for name, one in read_header(file).tensors.items()
    }


def _shard_places(file: Path) -> dict[str, Place]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: Place(file, one["dtype"], _DTYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in header.items()
        if name != "__metadata__"
    }
