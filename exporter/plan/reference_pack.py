"""The reference pack: a folder with the trained model's predictions, so that artifacts can be judged without it.

    reference.json         the inputs, the windows, and the size and hash of the other files
    tokens.safetensors     ids int32 (windows, n_ctx)
                           log_probabilities float64, top_tokens int32 (windows, scored)
    hidden.safetensors     hidden (windows, scored, hidden): final hidden states of the scored positions, after the norm
    prompts.safetensors    prompt_ids int32 (tokens,): the prompts that artifacts go on with, one after the other
                           prompt_states float32 (prompts, hidden): final hidden states of the last token of each
    head.safetensors       head (vocabulary, hidden) in the base's own dtype, float32 where an adapter changes it
    sketches.safetensors   sketches of the weights; see `exporter.plan.reference_pack`
    model/                 the model without its weights; see `exporter.reference.pack.model_files`

No file of logits exists: one product of states and head brings them back, a few positions at a time. Log-probabilities
and top tokens are those of the float32 states, whatever dtype the states are kept in. No time, path or host is in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from exporter.artifact.durable import json_document
from exporter.backends.model_folder.documents_check import UNREAD
from exporter.errors import MissingTensorError
from exporter.families.roles import HEAD
from exporter.inputs.checkpoint import DTYPE_BYTES
from exporter.inputs.sources import Source
from exporter.inputs.tokenizer import TOKENIZER_NAMES
from exporter.merge.model import MergedModel
from exporter.recipe import Inputs
from exporter.tokens.end_tokens import GENERATION_CONFIG
from exporter.tokens.prompts import Prompt, prompts_of
from exporter.tokens.windows import Windows

DESCRIPTION_NAME = "reference.json"
SCHEMA_VERSION = 2
TOKENS_FILE, HIDDEN_FILE, HEAD_FILE = "tokens.safetensors", "hidden.safetensors", "head.safetensors"
PROMPTS_FILE = "prompts.safetensors"
# The dtypes of stored hidden states, in safetensors' spelling.
STATE_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
REMEDY = "Make it again with `exporter reference`."


@dataclass(frozen=True)
class PackPlan:
    """What a pack will hold.

    Attributes:
        out: the folder that publishing creates.
        base: the base's source.
        adapters: the adapters' sources.
        model: the merged model.
        windows: the windows that the walk scores. An export may add windows that it draws later.
        first: how many of them an artifact is scored on first. The others are drawn while it is undecided.
        prompts: the prompts that artifacts continue; none where answers are left out.
        most: the largest number of windows that the pack may hold, with those drawn while a verdict is undecided.
        dtype: the dtype of stored hidden states: float32 or bfloat16.
        compute_dtype: the dtype that the walk computes in.
    """

    out: Path
    base: Source
    adapters: tuple[Source, ...]
    model: MergedModel
    windows: Windows
    first: int
    prompts: tuple[Prompt, ...]
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
        first: int,
    ) -> PackPlan:
        """Plan the pack that a recipe asks for, in `out`; see the attributes.

        Raises:
            TokenizerError: the tokenizer cannot be loaded.
        """
        prompts = prompts_of(model) if recipe.evaluation.answers else ()
        dtype = recipe.reference_dtype or "float32"
        return cls(out, base, adapters, model, windows, first, prompts, most, dtype, recipe.compute_dtype)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(len(prompt.ids) for prompt in self.prompts)

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
        shape = PackShape(
            windows, self.windows.n_ctx, self.windows.scored, self.vocabulary, self.hidden, self.prompt_lengths
        )
        updated = {tensor.name for tensor in self.model.tensors if tensor.updates}
        return pack_tensors(shape, dtype, stored) | sketch_tensors(self.model, updated)

    @cached_property
    def files(self) -> dict[str, int]:
        """The most bytes that each file can have, by name: all windows are drawn, and hidden states stay in float32.

        The description is not among them."""
        laid_out = lay_out(self.tensors("float32", self.most))
        tensors = {name: len(header) + nbytes for name, (header, nbytes) in laid_out.items()}
        return tensors | {name: len(content) for name, content in model_documents(self.model).items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all its files, at most."""
        return sum(self.files.values())

    @property
    def held_bytes(self) -> int:
        """The most bytes of memory for hidden states of drawn windows, until they are written."""
        return 4 * (self.most - len(self.windows.ids)) * self.windows.scored * self.hidden


@dataclass(frozen=True)
class PackShape:
    """The numbers that decide the shapes of a pack's tensors.

    Attributes:
        windows: number of windows.
        n_ctx: tokens in a window.
        scored: scored predictions in a window.
        vocabulary: rows of the head.
        hidden: elements of a hidden state.
        prompts: tokens of each prompt.
    """

    windows: int
    n_ctx: int
    scored: int
    vocabulary: int
    hidden: int
    prompts: tuple[int, ...]


def pack_tensors(shape: PackShape, dtype: str, head_dtype: str) -> dict[str, PackTensor]:
    """The tensors of a pack by name.

    Args:
        shape: decides their shapes.
        dtype: of hidden states: float32 or bfloat16.
        head_dtype: of the head, as safetensors calls it.
    """
    predictions = (shape.windows, shape.scored)
    return {
        # The widest elements first, so that each tensor is aligned to its own.
        "log_probabilities": PackTensor(TOKENS_FILE, "F64", predictions),
        "ids": PackTensor(TOKENS_FILE, "I32", (shape.windows, shape.n_ctx)),
        "top_tokens": PackTensor(TOKENS_FILE, "I32", predictions),
        "hidden": PackTensor(HIDDEN_FILE, STATE_DTYPES[dtype], (*predictions, shape.hidden)),
        "prompt_ids": PackTensor(PROMPTS_FILE, "I32", (sum(shape.prompts),)),
        "prompt_states": PackTensor(PROMPTS_FILE, "F32", (len(shape.prompts), shape.hidden)),
        "head": PackTensor(HEAD_FILE, head_dtype, (shape.vocabulary, shape.hidden)),
    }


MODEL_FOLDER = "model"
CONFIG, TENSORS = "config.json", "tensors.json"
NAMES = (CONFIG, GENERATION_CONFIG, TENSORS, *TOKENIZER_NAMES)
# Nothing can be judged without these.
NEEDED = (CONFIG, TENSORS, "tokenizer.json")


def model_documents(model: MergedModel) -> dict[str, bytes]:
    """The small files of a merged model that a pack holds: content by name, relative to the pack."""
    tensors = {one.name: {"dtype": one.source.dtype, "shape": list(one.shape)} for one in model.tensors}
    described = {"untied": model.untied, "tokenizer": model.tokenizer.origin, "tensors": tensors}
    # The pack does not say where the base was.
    config = {key: value for key, value in model.config.items() if not key.startswith(UNREAD)}
    found = {CONFIG: json_document(config), TENSORS: (json.dumps(described) + "\n").encode()}
    generation = model.base.folder / GENERATION_CONFIG
    if generation.is_file():
        found[GENERATION_CONFIG] = generation.read_bytes()
    found |= {name: file.read_bytes() for name, file in model.tokenizer.files.items()}
    return {f"{MODEL_FOLDER}/{name}": content for name, content in sorted(found.items())}


SKETCHES_FILE = "sketches.safetensors"
MERGED, DELTA, BASE_VALUES = "merged ", "delta ", "base_values"


def sketch_tensors(model: MergedModel, updated: Collection[str]) -> dict[str, PackTensor]:
    """The tensors of sketches by name, in model order.

    Args:
        model: the merged model.
        updated: the merged tensors that an adapter changes.
    """
    found: dict[str, PackTensor] = {}
    for tensor in model.tensors:
        one = PackTensor(SKETCHES_FILE, "F32", (tensor.source.rows, runs_of(tensor.source.columns)))
        found[f"{MERGED}{tensor.name}"] = one
        if tensor.name in updated:
            found[f"{DELTA}{tensor.name}"] = one
    return found | {BASE_VALUES: PackTensor(SKETCHES_FILE, "I32", (len(model.tensors), 2))}


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


# Columns of a run.
RUN = 512


def runs_of(columns: int) -> int:
    """Runs in a row; the last may be shorter."""
    return -(-columns // RUN)
