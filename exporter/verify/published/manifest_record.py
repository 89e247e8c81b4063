"""What verification goes by of a published folder: the part of its `export.json`, and of its model's configuration."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, model_validator

from exporter.artifact.file_records import MANIFEST_NAME, FileRecord, is_inside
from exporter.backends.registry import find_backend
from exporter.errors import ArtifactError, RecipeError
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.recipe import Calibration, Evaluation
from exporter.reference.pack.description import InputRecord
from exporter.runtimes.registry import choose_runtime
from exporter.tokens.windows import EMBEDDED, TokenSets, make_token_sets


class PublishedArtifact(BaseModel):
    """One of the artifacts of a folder."""

    format: str
    quant: str
    entry: str
    runtimes: list[str]
    bytes: int
    checksums: dict[str, str] = {}

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
            BackendError: the backend of its format does not load.
        """
        names = (wanted,) if wanted else self.runtimes
        backend = find_backend(self.format)
        packed = backend.packed_weights(self.path(folder)) if backend else frozenset()
        return choose_runtime(names, endpoint=endpoint, wanted=wanted, packed=packed)


class _Calibration(BaseModel):
    text: str | None = None
    tokens: int
    window: int
    seed: int


class _Evaluation(BaseModel):
    tokens: int
    max_tokens: int = Evaluation().max_tokens
    n_ctx: int


class _Recipe(BaseModel):
    calibration: _Calibration
    evaluation: _Evaluation


class MergeRecord(BaseModel):
    """What was merged: how many parameters."""

    parameters: int


class _Tokens(BaseModel):
    source: str
    sha256: str


class PublishedManifest(BaseModel):
    """The part of `export.json` that this needs; docs/export.schema.json has the whole."""

    name: str
    merge: MergeRecord
    artifacts: list[PublishedArtifact] = Field(min_length=1)
    files: dict[str, FileRecord]
    inputs: list[InputRecord] = []
    calibration: _Tokens | None = None
    evaluation: _Tokens | None = None
    recipe: _Recipe | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each artifact, by label."""
        return {artifact.label: artifact.bytes for artifact in self.artifacts}

    def as_exported(self, text: Calibration, evaluation: Evaluation) -> tuple[Calibration, Evaluation]:
        """Both with what they leave open as it was in the export; how calibration windows are cut is always as then.

        Raises:
            RecipeError: the text is left open, and the export's is a file that is not here.
        """
        if self.recipe is None:
            return text, evaluation
        then, scored = self.recipe.calibration.model_dump(), self.recipe.evaluation.model_dump()
        named = "text" in text.model_fields_set
        text = text.model_copy(update={key: value for key, value in then.items() if key != "text" or not named})
        if not named and text.file and not text.file.is_file():
            raise RecipeError(
                f"text {text.name} of the export",
                found="no such file here: the manifest holds its name alone",
                expected="the text whose beginning the export scored",
                remedy="Give its path, or another text, with --calibration.",
            )
        open_ = {key: value for key, value in scored.items() if key not in evaluation.model_fields_set}
        return text, evaluation.model_copy(update=open_)

    def held_against(self, text: Calibration, tokenizer: TokenizerFiles) -> tuple[Evaluation | None, list[str]]:
        """Whether a text is the one that the export cut its tokens from, by their hashes.

        Args:
            text: as `as_exported` gives it.
            tokenizer: of the trained model.

        Returns:
            The evaluation that calibration windows were cut beside, if this is their text; and what to say if it is
            not, though it is called the same.

        Raises:
            MissingFileError, TokenizerError: the text cannot be read.
        """
        known = {"evaluation": self.evaluation, "calibration": self.calibration}
        recorded = {name: tokens for name, tokens in known.items() if tokens is not None}
        if self.recipe is None or not recorded:
            return None, []
        cut = Evaluation(tokens=self.recipe.evaluation.tokens, n_ctx=self.recipe.evaluation.n_ctx)
        try:
            sets = make_token_sets(
                text, cut, tokenizer, evaluate="evaluation" in recorded, calibrate="calibration" in recorded
            )
        except RecipeError:
            # Too short to be it.
            sets = TokenSets(None, None)
        found = {"evaluation": sets.evaluation, "calibration": sets.calibration}
        others = [name for name, tokens in recorded.items() if getattr(found[name], "sha256", "") != tokens.sha256]
        notes = [
            f"the {name} tokens of {tokens.source} are not those of the export: the text or the tokenizer is another"
            + (", and what was calibrated on may be scored" if name == "calibration" else "")
            for name, tokens in recorded.items()
            if name in others and tokens.source == (text.name or EMBEDDED)
        ]
        return (cut if self.calibration and "calibration" not in others else None), notes

    def held_against_pack(self, source: str, tokens: int) -> list[str]:
        """What to say of a reference pack that may score what was calibrated on.

        Args:
            source: of its text.
            tokens: of all its windows.
        """
        if self.recipe is None or self.calibration is None or source != self.calibration.source:
            return []
        if tokens <= self.recipe.evaluation.tokens:
            return []
        return [f"the pack has more of {source} than the export scored: what was calibrated on may be scored"]

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
    if folder.is_file():
        raise ArtifactError(
            str(folder), found="a file by itself", expected="the folder that it was published in",
            remedy="Give the folder, or judge the file by a reference pack alone: --reference.",
        )  # fmt: skip
    try:
        return PublishedManifest.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            str(file),
            found=str(error).splitlines()[0],
            expected="the manifest of a published folder",
            remedy="Check the path, or export again.",
        ) from None
