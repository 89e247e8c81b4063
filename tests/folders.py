"""Copies of model folders with something changed in them, files that lie about themselves, listings and hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class _Deleted:
    """With a name that is the same in every process, as those of tests must be."""

    def __repr__(self) -> str:
        return "deleted"


DELETED = _Deleted()


def copy(folder: Path, target: Path) -> Path:
    """Copy a folder of the session's fixtures, so that a test may change it."""
    shutil.copytree(folder, target)
    return target


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; `DELETED` removes one."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    for key, value in changes.items():
        if value is DELETED:
            values.pop(key)
        else:
            values[key] = value
    file.write_text(json.dumps(values))


def rehash(document: Path, name: str) -> None:
    """Say in `export.json` or `reference.json` what a file beside it is now: as of a faulty exporter, not a disk."""
    file = document.parent / name
    files = json.loads(document.read_text())["files"]
    files[name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    edit_json(document, files=files)


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load a safetensors file, let `change` alter the mapping, and save it."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def pack(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file: length, header, data. The header may be an object or bytes; the length may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def unpack(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, read by the format's definition alone."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def listing(folder: Path) -> set[str]:
    """Every file, folder and link below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, by safetensors' own loader."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as they are stored."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
