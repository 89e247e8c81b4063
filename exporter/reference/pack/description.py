"""A reference pack read back: its description, whether its files are those described, and whether it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from exporter.artifact.file_records import FileRecord, check_files, is_inside
from exporter.artifact.input_records import role_of
from exporter.errors import ReferencePackError
from exporter.inputs.checkpoint import StoredTensor, read_header
from exporter.plan.reference_pack import (
    DESCRIPTION_NAME,
    HEAD_FILE,
    HIDDEN_FILE,
    MODEL_FOLDER,
    NEEDED,
    PROMPTS_FILE,
    REMEDY,
    SCHEMA_VERSION,
    SKETCHES_FILE,
    TOKENS_FILE,
    PackShape,
    PackTensor,
    pack_tensors,
)
from exporter.tokens.windows import Windows

_TENSOR_FILES = (TOKENS_FILE, HIDDEN_FILE, PROMPTS_FILE, HEAD_FILE, SKETCHES_FILE)


class _InputFile(BaseModel):
    name: str
    sha256: str


class InputRecord(BaseModel):
    """One of the inputs in `export.json` or `reference.json`: its role, and its files."""

    role: Literal["base", "adapter"]
    files: list[_InputFile] = Field(min_length=1)


class _Evaluation(BaseModel):
    source: str
    windows: int = Field(ge=1)
    first: int = Field(ge=1)
    n_ctx: int = Field(ge=3)
    first_scored: int
    tokens_scored: int
    sha256: str


class _States(BaseModel):
    dtype: Literal["float32", "bfloat16"]


class _Head(BaseModel):
    dtype: Literal["F32", "F16", "BF16"]


class Description(BaseModel):
    """The part of `reference.json` that judging needs; docs/reference.schema.json has the whole."""

    schema_version: Literal[2]
    inputs: list[InputRecord] = Field(min_length=1)
    evaluation: _Evaluation
    vocabulary: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    states: _States
    head: _Head
    prompts: dict[str, Annotated[int, Field(ge=1)]]
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _whole(self) -> Description:
        if missing := {*_TENSOR_FILES, *(f"{MODEL_FOLDER}/{name}" for name in NEEDED)} - self.files.keys():
            raise ValueError(f"{min(missing)} is not among the files")
        if self.evaluation.first > self.evaluation.windows:
            raise ValueError("more windows are scored first than there are")
        if outside := [name for name in self.files if not is_inside(name)]:
            raise ValueError(f"{outside[0]} is outside of the folder")
        return self


def read_description(folder: Path) -> Description:
    """The description of a pack.

    Raises:
        ReferencePackError: there is none, it is not one, or it is of another version.
    """
    file = folder / DESCRIPTION_NAME
    try:
        return Description.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ReferencePackError(
            str(file),
            found=" ".join(str(error).splitlines()[:3]),
            expected=f"the description of a reference pack, version {SCHEMA_VERSION}",
            remedy=f"Check the path. {REMEDY}",
        ) from None


def open_tensors(folder: Path, description: Description) -> dict[str, StoredTensor]:
    """The tensors of a pack by name, once every file was found to have the hash, and to hold what the description says.

    Raises:
        ReferencePackError: one is missing, was changed, or does not fit the description.
        CheckpointError: one is not a safetensors file.
    """
    check_files(folder, description.files, error=ReferencePackError, remedy="make")
    stored: dict[str, StoredTensor] = {}
    for file in _TENSOR_FILES:
        stored |= read_header(folder / file)
    evaluation = description.evaluation
    protocol = Windows((), evaluation.n_ctx, evaluation.source, evaluation.sha256)
    first, scored = protocol.first_scored, protocol.scored
    if (evaluation.first_scored, evaluation.tokens_scored) != (first, evaluation.windows * scored):
        raise ReferencePackError(
            DESCRIPTION_NAME,
            found=f"{evaluation.tokens_scored} predictions from position {evaluation.first_scored} of each window",
            expected=f"{evaluation.windows * scored} from position {first}",
            remedy=REMEDY,
        )
    shape = PackShape(
        evaluation.windows,
        evaluation.n_ctx,
        scored,
        description.vocabulary,
        description.hidden_size,
        tuple(description.prompts.values()),
    )
    wanted = pack_tensors(shape, description.states.dtype, description.head.dtype)
    for name, tensor in wanted.items():
        check_tensor(name, stored.get(name), tensor, DESCRIPTION_NAME)
    return stored


def check_tensor(name: str, found: StoredTensor | None, wanted: PackTensor, by: str) -> None:
    """A tensor of the pack must be where it should be, and as it should be.

    Args:
        name: its name.
        found: what is stored; None if nothing is.
        wanted: what should be.
        by: what says so, for the message.

    Raises:
        ReferencePackError: it is not.
    """
    if found is None or (found.file.name, found.dtype, found.shape) != (wanted.file, wanted.dtype, wanted.shape):
        raise ReferencePackError(
            f"{wanted.file}: {name}",
            found=f"{found.dtype} {list(found.shape)}" if found else "no such tensor",
            expected=f"{wanted.dtype} {list(wanted.shape)} by {by}",
            remedy=REMEDY,
        )


def check_belongs(description: Description, artifact: str, inputs: Sequence[InputRecord]) -> None:
    """The pack must be of the base and the adapters that the artifact was made from, file by file.

    The configuration and the tokenizer are among these files, so another vocabulary is refused as another base is.

    Args:
        description: the pack's.
        artifact: the artifact's name, for the message.
        inputs: the artifact's, from its manifest.

    Raises:
        ReferencePackError: it is not, or the manifest does not say.
    """
    pack, made_from = _hashes(description.inputs), _hashes(inputs)
    if not made_from:
        raise ReferencePackError(
            f"{artifact}: inputs", found="none in its manifest", expected="base and adapters with the hashes of files",
            remedy="Verify it with --base and --adapter.",
        )  # fmt: skip
    # Weights that only the artifact was made from count as well: one more adapter, say.
    more = [key for key in made_from if key not in pack and key[1].endswith(".safetensors")]
    for role, name in [*pack, *more]:
        ours, theirs = pack.get((role, name)), made_from.get((role, name))
        if ours != theirs:
            raise ReferencePackError(
                f"{role} {name}",
                found=f"{_short(ours)} in the reference pack",
                expected=f"{_short(theirs)} in the manifest of {artifact}",
                remedy="Give the pack that was made from the same base and adapters, or make it with `exporter "
                "reference`.",
            )


def _hashes(inputs: Sequence[InputRecord]) -> dict[tuple[str, str], str]:
    """Hash of each file by role (adapters by their order) and name."""
    found: dict[tuple[str, str], str] = {}
    adapters = 0
    for one in inputs:
        role = "base"
        if one.role == "adapter":
            role, adapters = role_of(adapters), adapters + 1
        found |= {(role, file.name): file.sha256 for file in one.files}
    return found


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:16]}…" if digest else "no such file"
