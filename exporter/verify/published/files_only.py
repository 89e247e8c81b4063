"""Holds the files of a published folder against base and adapters, and scores nothing, so that no runtime is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifact.file_records import check_files
from exporter.backends.registry import find_backend
from exporter.plan.open_model import open_trained
from exporter.plan.reporter import Reporter
from exporter.recipe import Execution
from exporter.verify.published.manifest_record import read_manifest
from exporter.verify.weights.as_json import weights_json
from exporter.verify.weights.check import WeightsResult, read_weights

UNREADABLE = "what writes this format is not here or cannot read its files back"


@dataclass(frozen=True)
class FilesResult:
    """What the files of a published folder hold.

    Attributes:
        folder: the folder.
        weights: by artifact label; None where nothing here can read them back.
    """

    folder: Path
    weights: dict[str, WeightsResult | None]

    @property
    def broken(self) -> dict[str, tuple[str, ...]]:
        """What is wrong with each artifact, in words."""
        return {label: found.broken if found else (UNREADABLE,) for label, found in self.weights.items()}

    @property
    def passed(self) -> bool:
        """Whether every artifact was read back and nothing is wrong with it."""
        return not any(self.broken.values())

    def as_json(self) -> dict[str, Any]:
        """What was found as JSON, by artifact label."""
        return {
            label: {"broken": list(self.broken[label]), "weights": weights_json(found)}
            for label, found in self.weights.items()
        }


def verify_files(folder: Path, base: str, adapters: tuple[str, ...], reporter: Reporter) -> FilesResult:
    """Check hashes, then hold every artifact's weights, configuration and tokenizer against base and adapters.

    Args:
        folder: what was published.
        base: a folder or a hub id.
        adapters: likewise.
        reporter: told about every artifact.

    Raises:
        ArtifactError: there is no manifest, or a file is missing or is not the one that was published.
        RefusalError: base or adapters cannot be read, or do not fit.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    model = open_trained(base, adapters, manifest.name)
    threads = Execution().workers
    found: dict[str, WeightsResult | None] = {}
    for artifact in manifest.artifacts:
        reporter.doing(f"weights of {artifact.label}")
        backend = find_backend(artifact.format)
        path, known = artifact.path(folder), artifact.checksums
        found[artifact.label] = read_weights(backend, model, artifact.quant, path, threads, known)
    reporter.scored()
    return FilesResult(folder, found)
