"""The reference pack: a folder that holds what the trained model said, so that artifacts can be judged without it.

    reference.json         what it was made from, what was scored, and the size and hash of the other files
    tokens.safetensors     ids int32 (windows, n_ctx)
                           log_probabilities float64, top_tokens int32 (windows, scored)
    hidden.safetensors     hidden (windows, scored, hidden): final hidden states of the scored positions, after the norm
    head.safetensors       head (vocabulary, hidden) in the base's own dtype, float32 where an adapter changes it

No file of logits exists: one product of states and head brings them back, a few positions at a time. Log-probabilities
and top tokens are those of the float32 states, whatever the states are kept in. No time, path or host is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from exporter.artifact.files import FileRecord, check_files, is_inside
from exporter.artifact.inputs import role_of
from exporter.calibration import Windows
from exporter.checkpoint import DTYPE_BYTES, StoredTensor, read_header
from exporter.errors import MissingTensorError, ReferencePackError
from exporter.model import HEAD, MergedModel
from exporter.recipe import Inputs
from exporter.sources import Source

DESCRIPTION_NAME = "reference.json"
SCHEMA_VERSION = 1
TOKENS_FILE, HIDDEN_FILE, HEAD_FILE = "tokens.safetensors", "hidden.safetensors", "head.safetensors"
# What hidden states are kept in, as safetensors calls it.
STATE_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
REMEDY = "Make it again with `exporter reference`."


@dataclass(frozen=True)
class PackTensor:
    """One tensor of a pack.

    Attributes:
        file: the file that holds it.
        dtype: as safetensors calls it.
        shape: its dimensions, outermost first.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class PackPlan:
    """What a pack will hold.

    Attributes:
        out: the folder that publishing creates.
        base: the base's source.
        adapters: the adapters' sources.
        model: the merged model.
        windows: what is scored.
        most: how many windows it may hold: what is drawn while a verdict is undecided is kept as well.
        dtype: what hidden states are to be kept in: float32 or bfloat16.
        compute_dtype: what the walk computes in.
    """

    out: Path
    base: Source
    adapters: tuple[Source, ...]
    model: MergedModel
    windows: Windows
    most: int
    dtype: str
    compute_dtype: str

    @classmethod
    def of(
        cls,
        recipe: Inputs,
        out: Path,
        base: Source,
        adapters: tuple[Source, ...],
        model: MergedModel,
        windows: Windows,
        most: int,
    ) -> PackPlan:
        """What a recipe asks for, in `out`."""
        dtype = recipe.reference_dtype or "float32"
        return cls(out, base, adapters, model, windows, most, dtype, recipe.compute_dtype)

    @property
    def hidden(self) -> int:
        """Elements of a hidden state."""
        return int(self.model.config["hidden_size"])

    @property
    def vocabulary(self) -> int:
        """Rows of the head.

        Raises:
            MissingTensorError: the model has none.
        """
        head = self.model.head
        if head is None:
            raise MissingTensorError(HEAD, found="no such tensor", expected="one", remedy="Fetch the base again.")
        return head.shape[0]

    def tensors(self, dtype: str, windows: int) -> dict[str, PackTensor]:
        """The tensors by name, with hidden states of so many windows in `dtype`."""
        head = self.model.head
        stored = "F32" if head is None or head.updates else head.source.dtype
        shape = (windows, self.windows.n_ctx, self.windows.scored, self.vocabulary, self.hidden)
        return pack_tensors(*shape, dtype, stored)

    @property
    def files(self) -> dict[str, int]:
        """Bytes of each file of tensors at most, by name: with all windows that may be drawn, and hidden states in
        float32, which they may turn out to be kept in."""
        laid_out = lay_out(self.tensors("float32", self.most))
        return {name: len(header) + nbytes for name, (header, nbytes) in laid_out.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all its files of tensors, at most."""
        return sum(self.files.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of memory for hidden states of windows that are drawn, until they are written: at most."""
        return 4 * (self.most - len(self.windows.ids)) * self.windows.scored * self.hidden


def pack_tensors(
    windows: int, n_ctx: int, scored: int, vocabulary: int, hidden: int, dtype: str, head_dtype: str
) -> dict[str, PackTensor]:
    """The tensors of a pack by name.

    Args:
        windows: number of windows.
        n_ctx: tokens in a window.
        scored: scored predictions in a window.
        vocabulary: rows of the head.
        hidden: elements of a hidden state.
        dtype: of hidden states: float32 or bfloat16.
        head_dtype: of the head, as safetensors calls it.
    """
    return {
        # The widest first, so that each is aligned to its elements.
        "log_probabilities": PackTensor(TOKENS_FILE, "F64", (windows, scored)),
        "ids": PackTensor(TOKENS_FILE, "I32", (windows, n_ctx)),
        "top_tokens": PackTensor(TOKENS_FILE, "I32", (windows, scored)),
        "hidden": PackTensor(HIDDEN_FILE, STATE_DTYPES[dtype], (windows, scored, hidden)),
        "head": PackTensor(HEAD_FILE, head_dtype, (vocabulary, hidden)),
    }


def lay_out(tensors: Mapping[str, PackTensor]) -> dict[str, tuple[bytes, int]]:
    """Header and bytes of data of each file, by name; a file's tensors follow each other in the order given.

    The header is padded so that the data starts aligned to 8 bytes (https://github.com/huggingface/safetensors,
    "Format").
    """
    found = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        fields, position = {}, 0
        for name, tensor in tensors.items():
            if tensor.file == file:
                offsets = [position, position + tensor.nbytes]
                fields[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
                position += tensor.nbytes
        packed = json.dumps(fields, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        found[file] = len(packed).to_bytes(8, "little") + packed, position
    return found


# --- reading back --------------------------------------------------------------------------------------------------


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

    schema_version: Literal[1]
    inputs: list[InputRecord] = Field(min_length=1)
    evaluation: _Evaluation
    vocabulary: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    states: _States
    head: _Head
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _whole(self) -> Description:
        if missing := {TOKENS_FILE, HIDDEN_FILE, HEAD_FILE} - self.files.keys():
            raise ValueError(f"{min(missing)} is not among the files")
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
    for file in (TOKENS_FILE, HIDDEN_FILE, HEAD_FILE):
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
    shape = (evaluation.windows, evaluation.n_ctx, scored, description.vocabulary, description.hidden_size)
    wanted = pack_tensors(*shape, description.states.dtype, description.head.dtype)
    for name, tensor in wanted.items():
        found = stored.get(name)
        if found is None or (found.file.name, found.dtype, found.shape) != (tensor.file, tensor.dtype, tensor.shape):
            raise ReferencePackError(
                f"{tensor.file}: {name}",
                found=f"{found.dtype} {list(found.shape)}" if found else "no such tensor",
                expected=f"{tensor.dtype} {list(tensor.shape)} by {DESCRIPTION_NAME}",
                remedy=REMEDY,
            )
    return stored


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
