"""What to export: frozen, validated, unknown keys refused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from exporter.errors import MissingFileError, RecipeError


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


# An address of a server, with or without a path.
ENDPOINT = r"^https?://[^/]"

Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
# OWNER/NAME[@REVISION][:[CONFIGURATION/]SPLIT][#COLUMN]; what ends like a text file is never one.
_DATASET = re.compile(
    r"(?!.*\.(?:txt|jsonl|json)$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?(?::(?:[\w.-]+/)?[\w.-]+)?(?:#\w+)?"
)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Output(_Frozen):
    """One output folder.

    Attributes:
        format: name of the backend.
        out: the folder that publishing creates.
        quant: quantization types; empty for the backend's default.
        options: options of the backend.
    """

    format: str
    out: Path
    quant: Names = ()
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("quant")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({name.lower() for name in value}) != len(value):
            raise ValueError("every quantization type once")
        return value


class Calibration(_Frozen):
    """The text that both token sets come from, and the calibration tokens.

    Attributes:
        text: a .txt or .jsonl file; or a dataset of the hub, as
            `OWNER/NAME[@REVISION][:[CONFIGURATION/]SPLIT][#COLUMN]`; None for the embedded text.
        tokens: calibration tokens; whole windows of `window` are used, at least one.
        window: tokens in a calibration window.
        seed: decides which windows of the text are taken.
    """

    text: Path | str | None = None
    tokens: int = Field(default=16384, ge=64)
    window: int = Field(default=1024, ge=16, le=32768)
    seed: int = 0

    @property
    def dataset(self) -> str | None:
        """The dataset's id, if `text` is one: it looks like one, and no such file exists."""
        text = self.text
        return text if isinstance(text, str) and _DATASET.fullmatch(text) and not _is_file(Path(text)) else None

    @property
    def file(self) -> Path | None:
        """The file of the text, if it is not a dataset and not embedded."""
        return None if self.text is None or self.dataset else Path(self.text)

    @property
    def name(self) -> str | None:
        """The dataset's id, or the file's name without any folder."""
        return self.dataset or (self.file.name if self.file else None)


_Limit = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Limits(_Frozen):
    """Limits of one type, in place of the built-in ones; None leaves a limit as it is.

    Attributes:
        change: largest relative change of perplexity, up or down.
        kl: largest mean KL divergence in nats, over the whole vocabulary.
        top_k_kl: the same for its top-k form, which is what vLLM gives.
        same_top: smallest share of predictions with the trained model's likeliest token.
    """

    change: _Limit | None = None
    kl: _Limit | None = None
    top_k_kl: _Limit | None = None
    same_top: Annotated[float, Field(ge=0, le=1)] | None = None


class Evaluation(_Frozen):
    """What verification scores.

    Attributes:
        tokens: evaluation tokens; whole windows of `n_ctx` are used, at least one.
        max_tokens: tokens that may be drawn in all while the verdict is undecided; `tokens`, if that is more.
        n_ctx: window in tokens, as llama-perplexity's `--ctx-size`.
        gate: limits by quantization type, or by `*`, in place of the built-in ones; a number is the largest change of
            perplexity and lifts the other limits.
        answers: whether artifacts are asked for answers as well.
    """

    tokens: int = Field(default=4096, ge=64)
    max_tokens: int = Field(default=16384, ge=64)
    n_ctx: int = Field(default=512, ge=16, le=32768)
    gate: dict[str, _Limit | Limits] = Field(default_factory=dict)
    answers: bool = True

    @field_validator("gate")
    @classmethod
    def _distinct(cls, value: dict[str, float | Limits]) -> dict[str, float | Limits]:
        if len({key.lower() for key in value}) != len(value):
            raise ValueError("the limits of every quantization type once, in whatever case it is written")
        return value


class Inputs(_Frozen):
    """What a trained model is made of, and how it is scored.

    Attributes:
        base: a folder or a hub id, with `@revision` if need be.
        adapters: likewise, added in this order.
        name: name of the merged model; by default made from the names of base and adapters.
        calibration: the text, and what is calibrated on.
        evaluation: what is scored.
        compute_dtype: what the walk through the layers computes in: statistics and the reference come from it.
        reference_dtype: what a reference pack keeps hidden states in; None for float32.
        force: replace output folders that exist.
    """

    base: str
    adapters: Names = ()
    name: str | None = None
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    reference_dtype: Literal["float32", "bfloat16"] | None = None
    force: bool = False

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ -]*", value):
            raise ValueError("letters, digits, dots, dashes, underscores and spaces only, since it names files")
        return value

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Validate a mapping.

        Raises:
            RecipeError: a key is unknown, missing or of the wrong kind.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            raise RecipeError(
                where, found=repr(first.get("input"))[:120], expected=first["msg"], remedy="Correct the recipe."
            ) from None


class ReferenceRecipe(Inputs):
    """A reference pack by itself.

    Attributes:
        out: the folder that publishing creates.
    """

    out: Path


class Recipe(Inputs):
    """Everything that decides the bytes of the outputs.

    Attributes:
        outputs: at least one.
        verify: whether to score the outputs and let the gate decide.
        keep_reference: whether to write a reference pack beside the first output, as `OUT.reference`.
    """

    outputs: tuple[Output, ...] = Field(min_length=1)
    verify: bool = True
    keep_reference: bool = False

    @model_validator(mode="after")
    def _separate(self) -> Recipe:
        folders = [output.out.resolve() for output in self.outputs]
        if len(set(folders)) != len(folders):
            raise ValueError("every output needs a folder of its own")
        return self

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """Read a YAML recipe; relative paths in it are relative to its folder.

        Raises:
            MissingFileError: no such file.
            RecipeError: it is not YAML, or does not validate.
        """
        if not file.is_file():
            raise MissingFileError(str(file), found="no such file", expected="a YAML recipe", remedy="Check the path.")
        try:
            values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(str(file), found=str(error)[:200], expected="YAML", remedy="Correct the file.") from None
        if not isinstance(values, dict):
            raise RecipeError(
                str(file), found=type(values).__name__, expected="a mapping with base and outputs", remedy="Correct it."
            )
        return cls.build(_anchored(values, file.parent))


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _anchored(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make paths relative to the recipe's folder; what is not there stays a hub id."""

    def source(value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) and (folder / value).is_dir() else value

    def text(value: str) -> str:
        looks_like_a_file = _is_file(folder / value) or Path(value).suffix in TEXT_SUFFIXES
        return str(folder / value) if looks_like_a_file else value

    anchored = dict(values)
    anchored["base"] = source(values.get("base"))
    adapters = _as_tuple(values.get("adapters"))
    anchored["adapters"] = [source(value) for value in adapters] if isinstance(adapters, list | tuple) else adapters
    if isinstance(values.get("outputs"), list):
        anchored["outputs"] = [
            _anchored_output(entry, folder) if isinstance(entry, dict) else entry for entry in values["outputs"]
        ]
    calibration = values.get("calibration")
    if isinstance(calibration, dict) and isinstance(calibration.get("text"), str):
        anchored["calibration"] = calibration | {"text": text(calibration["text"])}
    return anchored


def _anchored_output(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    anchored, options = dict(entry), entry.get("options")
    if isinstance(entry.get("out"), str):
        anchored["out"] = str(folder / entry["out"])
    if isinstance(options, dict) and isinstance(options.get("imatrix"), str):
        words = options["imatrix"] in ("auto", "none")
        anchored["options"] = options | ({} if words else {"imatrix": str(folder / options["imatrix"])})
    return anchored


class Execution(_Frozen):
    """How to run: nothing here changes a byte of the outputs, but for the device. The verdict is the runtime's.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: worker threads; None for one a core.
        block_bytes: float32 bytes of a row block.
        runtime: what scores every artifact; None for the first that serves it and can be had here.
        endpoint: address of a running vLLM server that scores in place of one that is started.
    """

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int | None = Field(default=None, ge=1)
    block_bytes: int = Field(default=4 << 20, ge=4096)
    runtime: str | None = None
    endpoint: str | None = Field(default=None, pattern=ENDPOINT)

    @property
    def workers(self) -> int:
        """Worker threads, the default resolved."""
        return self.threads or len(os.sched_getaffinity(0))
