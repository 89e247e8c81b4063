"""Writes files so that they survive a crash: write, sync, rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from exporter.artifact.hashing import HASH_CHUNK_BYTES


def write_durably(file: Path, content: bytes) -> None:
    """Write a small file and bring it to the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's content (not its times or modes) and bring it to the disk."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, HASH_CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder` to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def json_document(value: Any) -> bytes:
    """JSON as files store it: indented, so that two versions of a file can be compared line by line."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
