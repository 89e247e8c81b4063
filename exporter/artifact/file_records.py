"""The recorded size and hash of each file of a published folder, and the check of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath

from pydantic import BaseModel, Field

from exporter.artifact.hashing import sha256
from exporter.errors import ArtifactError


class FileRecord(BaseModel):
    """Size in bytes and SHA-256, hexadecimal."""

    bytes: int = Field(ge=0)
    sha256: str


def is_inside(name: str) -> bool:
    """Whether a name relative to a folder stays inside the folder."""
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def check_files(
    folder: Path, files: Mapping[str, FileRecord], *, error: type[ArtifactError] = ArtifactError, remedy: str = "export"
) -> None:
    """Check that every file on record is there, with its size and hash.

    Args:
        folder: where they are.
        files: the records, by name.
        error: the error to raise.
        remedy: how the reader makes the folder again, as in "copy or export it again".

    Raises:
        ArtifactError: a file is missing or differs.
    """
    for name, record in files.items():
        file = folder / name
        if not file.is_file():
            raise error(name, found="no such file", expected="every file on record", remedy="Copy it again.")
        size = file.stat().st_size
        if size != record.bytes or (found := sha256(file)) != record.sha256:
            raise error(
                name,
                found=f"{size} bytes" if size != record.bytes else f"sha256 {found[:16]}…",
                expected=f"{record.bytes} bytes" if size != record.bytes else f"sha256 {record.sha256[:16]}…",
                remedy=f"The file was changed or damaged after publishing: copy or {remedy} it again.",
            )


MANIFEST_NAME = "export.json"
