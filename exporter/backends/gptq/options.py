"""What a GPTQ output can be asked for: the short form of a type, options, and other settings for some modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from exporter.backends.gptq.names import QUANTS, parse_quant
from exporter.backends.model_folder.layout import DEFAULT_MAX_SHARD_BYTES
from exporter.errors import RecipeError, UnknownQuantizationError

# Fraction of the mean diagonal. Measured with 8,192 tokens on three layers of a 0.5B, error on other text: 0.1 is 1 to
# 2 % better than 0.05 and 5 % better than 0.02, most where inputs are many and tokens few.
DEFAULT_DAMP = 0.1
# Inputs below which a matrix is rounded. Fewer than the columns of a group say nothing about how its errors add up;
# only an expert that the router hardly chose sees so few.
FEWEST_TOKENS = 128


def bits_and_group(name: str) -> tuple[int, int]:
    """Bits and group size of a type.

    Raises:
        UnknownQuantizationError: there is none of that name.
    """
    parsed = parse_quant(name)
    if parsed is None:
        raise UnknownQuantizationError(
            f"gptq type {name!r}", found="no such type", expected="one of " + " ".join(QUANTS),
            remedy="See `exporter formats`.",
        )  # fmt: skip
    return parsed


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized.

    Attributes:
        bits: bits of a code.
        group_size: input columns that share a scale; -1 for all.
        sym: whether the zero point is fixed in the middle of the codes.
        desc_act: whether columns are quantized, and grouped, by falling importance.
        damp: what is added to the Hessian's diagonal, as a fraction of its mean.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    damp: float

    def rule(self) -> dict[str, Any]:
        """As an entry of `dynamic` in quantization_config."""
        return {"bits": self.bits, "group_size": self.group_size, "sym": self.sym, "desc_act": self.desc_act}


class Override(BaseModel):
    """Settings that differ for some modules; what is not given is as elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] | None = None
    group_size: Literal[-1, 32, 64, 128] | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    damp: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    def apply(self, scheme: Scheme) -> Scheme:
        """The scheme with what is given here."""
        return replace(scheme, **self.model_dump(exclude_none=True))


class GptqOptions(BaseModel):
    """Options of the backend.

    Attributes:
        bits, group_size: in place of the type's.
        sym, desc_act, damp: see `Scheme`.
        true_sequential: take each Hessian of a layer after the matrices before it were quantized. Half as slow again,
            without a gain where it was measured.
        checkpoint_format: `gptq` (v1: zero points are stored less one) or `gptq_v2`.
        overrides: by a regular expression for the names of modules, other settings; None keeps them in 16 bits. The
            last one that matches a whole name counts.
        force_unservable: write what no server takes.
        max_shard_size: largest shard: bytes, or a number with a unit such as `5GB`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] | None = None
    group_size: Literal[-1, 32, 64, 128] | None = None
    sym: bool = True
    desc_act: bool = False
    damp: float = Field(default=DEFAULT_DAMP, ge=0, allow_inf_nan=False)
    true_sequential: bool = False
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    overrides: dict[str, Override | None] = Field(default_factory=dict)
    force_unservable: bool = False
    max_shard_size: int | str = DEFAULT_MAX_SHARD_BYTES

    @field_validator("bits", "group_size", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value

    @field_validator("overrides", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        """On a command line they are JSON."""
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("overrides")
    @classmethod
    def _patterns(cls, value: dict[str, Override | None]) -> dict[str, Override | None]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> GptqOptions:
        """Validate options.

        Raises:
            RecipeError: one is unknown or has a value that it cannot have.
        """
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecipeError(
                f"gptq option {where}",
                found=repr(first.get("input"))[:120],
                expected=first["msg"],
                remedy="See docs/formats.md.",
            ) from None

    def scheme(self, quant: str) -> Scheme:
        """How matrices without an override are quantized.

        Raises:
            UnknownQuantizationError: `quant` is no short form.
        """
        bits, group_size = bits_and_group(quant)
        chosen = group_size if self.group_size is None else self.group_size
        return Scheme(self.bits or bits, chosen, self.sym, self.desc_act, self.damp)

    def scheme_of(self, module: str, scheme: Scheme) -> Scheme | None:
        """How one module is quantized; None if it stays in 16 bits."""
        for pattern, override in self.overrides.items():
            if re.fullmatch(pattern, module):
                if override is None:
                    return None
                scheme = override.apply(scheme)
        return scheme
