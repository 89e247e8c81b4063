"""What verification goes by of a published folder: the part of its `export.json`, and of its model's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from exporter.artifact.files import FileRecord, is_inside
from exporter.artifact.manifest import MANIFEST_NAME
from exporter.errors import ArtifactError
from exporter.recipe import Calibration, Evaluation
from exporter.runtimes.base import choose_runtime
from exporter.verify.pack import InputRecord


class PublishedArtifact(BaseModel):
    """One of the artifacts of a folder."""

    format: str
    quant: str
    entry: str
    runtimes: list[str]
    bytes: int

    @property
    def label(self) -> str:
        """Format and type."""
        return f"{self.format} {self.quant}"

    def path(self, folder: Path) -> Path:
        """What a runtime loads."""
        return folder if self.entry == "." else folder / self.entry

    def runtime(self, folder: Path, endpoint: str | None = None, wanted: str | None = None) -> str:
        """The runtime that scores it here, as an export would choose; the one that is wanted, listed or not.

        Args:
            folder: where the artifact is.
            endpoint: address of a running vLLM server, or None.
            wanted: the runtime that was asked for, or None.

        Raises:
            RecipeError: none can be had here.
        """
        names = (wanted,) if wanted else self.runtimes
        return choose_runtime(names, endpoint=endpoint, wanted=wanted, packed_bits=_packed_bits(self.path(folder)))


class _Calibration(BaseModel):
    tokens: int
    window: int
    seed: int


class _Evaluation(BaseModel):
    tokens: int
    n_ctx: int


class _Recipe(BaseModel):
    calibration: _Calibration
    evaluation: _Evaluation


class PublishedManifest(BaseModel):
    """The part of `export.json` that this needs; docs/export.schema.json has the whole."""

    name: str
    artifacts: list[PublishedArtifact] = Field(min_length=1)
    files: dict[str, FileRecord]
    inputs: list[InputRecord] = []
    calibration: dict[str, Any] | None = None
    recipe: _Recipe | None = None

    def calibrated_on(self, text: Calibration, evaluation: Evaluation) -> tuple[Calibration, Evaluation]:
        """The text cut as it was then, and as many tokens to be scored as now."""
        if self.recipe is None:
            return text, evaluation
        then, scored = self.recipe.calibration, self.recipe.evaluation.tokens
        update = {"max_tokens": max(evaluation.max_tokens, evaluation.tokens), "tokens": scored}
        return text.model_copy(update=then.model_dump()), evaluation.model_copy(update=update)

    @model_validator(mode="after")
    def _inside(self) -> PublishedManifest:
        for name in [*self.files, *(artifact.entry for artifact in self.artifacts)]:
            if not is_inside(name):
                raise ValueError(f"{name} is outside of the folder")
        for artifact in self.artifacts:
            if artifact.entry != "." and artifact.entry not in self.files:
                raise ValueError(f"{artifact.entry} is not among the files")
        return self


def read_manifest(folder: Path) -> PublishedManifest:
    """The manifest of a published folder.

    Raises:
        ArtifactError: there is none, or it is not a manifest.
    """
    file = folder / MANIFEST_NAME
    try:
        return PublishedManifest.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            str(file),
            found=str(error).splitlines()[0],
            expected="the manifest of a published folder",
            remedy="Check the path, or export again.",
        ) from None


def _packed_bits(entry: Path) -> int | None:
    """The most bits of any GPTQ weight of a model folder: of its configuration, or of a rule for some modules.

    None for what has none, and for a configuration that cannot be read, which whoever loads it will say.
    """
    try:
        config = json.loads((entry / "config.json").read_bytes())["quantization_config"]
        rules = (config.get("dynamic") or {}).values()
        return max(int(one["bits"]) for one in (config, *rules) if "bits" in one)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
