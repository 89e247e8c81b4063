"""Bases and adapters: folders, or ids on a model hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import HubError, MissingFileError
from exporter.inputs.tokenizer import TOKENIZER_NAMES

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?$")
_BASE_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "model*.safetensors",
    "model.safetensors.index.json", "README.md", "LICENSE", "LICENSE.txt", *TOKENIZER_NAMES,
)  # fmt: skip
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_NAMES)


@dataclass(frozen=True)
class Source:
    """A base or an adapter on this machine.

    Attributes:
        folder: where its files are.
        name: its name without any path: the folder's, or the last part of the hub id.
        hub_id: the hub id it came from.
        revision: the commit it was resolved to, if it came from a hub.
    """

    folder: Path
    name: str
    hub_id: str | None = None
    revision: str | None = None


def resolve_base(source: str) -> Source:
    """A base by folder or hub id; see `resolve`."""
    return resolve(source, _BASE_FILES, "base")


def resolve_adapter(source: str) -> Source:
    """An adapter by folder or hub id; see `resolve`."""
    return resolve(source, _ADAPTER_FILES, "adapter")


def resolve(source: str, patterns: tuple[str, ...], role: str) -> Source:
    """Find the files of a source, fetching the ones that match `patterns` if it is a hub id (`name@revision`).

    Raises:
        MissingFileError: it is a path, and no folder is there.
        HubError: the hub does not have it, or cannot be reached.
    """
    try:
        folder = Path(source).expanduser()
        present = bool(source) and folder.is_dir()
    except (OSError, RuntimeError):
        # A name too long for a file, or the home of nobody.
        folder, present = Path(source), False
    if present:
        return Source(folder, folder.resolve().name)
    match = _HUB_ID.match(source)
    if match is None or folder.is_absolute() or source.startswith("."):
        raise MissingFileError(
            f"{role} {source!r}", found="no such folder", expected="a folder or a hub id", remedy="Check the path."
        )
    return _download(match["repo"], match["revision"], patterns, role)


def _download(repo: str, revision: str | None, patterns: tuple[str, ...], role: str) -> Source:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the library lets its transport's own errors through
        lines = str(error).strip().splitlines()
        raise HubError(
            f"{role} {repo}" + (f"@{revision}" if revision else ""),
            found=(lines[0] if lines else type(error).__name__)[:200],
            expected="a folder on this machine or a repository on the hub",
            remedy="Check the name, the network and the token (HF_TOKEN), or give a local folder.",
        ) from None
    # A snapshot lies in a folder that is named after its commit.
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Source(folder, repo.rsplit("/", 1)[-1], repo, commit or revision)
