"""Which type each tensor of a GGUF file gets, given the file type.

The rules are llama.cpp's (`llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp of the release
inside llama-cpp-python 0.3.36), restricted to dense Qwen models. They are data here: for each file type a default and,
for the kinds of matrix that are treated better, a rule over the layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Elements and bytes of one block (ggml-common.h; the same numbers as gguf.GGML_QUANT_SIZES).
BLOCK_SIZES: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_XS": (256, 136),
}  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16")

# tensor_type_fallback: what a type becomes when a row is not a multiple of its block.
FALLBACKS: Mapping[str, str] = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """What the rules need to know of the model.

    Attributes:
        layers: number of decoder layers.
        gqa: query heads per key-value head.
        tied: whether the head is the embedding.
        bump_attn_v: whether Q3_K and Q4_K of attn_v become Q5_K, as llama.cpp does for Qwen2 with 80 layers.
    """

    layers: int
    gqa: int
    tied: bool
    bump_attn_v: bool = False


@dataclass(frozen=True)
class Position:
    """Where a tensor stands: the layer's number and the model."""

    layer: int
    model: ModelShape

    @property
    def favoured(self) -> bool:
        """The first and last eighth of the layers and every third between (`use_more_bits`)."""
        eighth = self.model.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.model.layers // 8 or (self.layer - eighth) % 3 == 2

    def before(self, fraction: int) -> bool:
        """Whether the layer is in the first 1/fraction."""
        return self.layer < self.model.layers // fraction


Rule = Callable[[Position], str]


@dataclass(frozen=True)
class FileType:
    """One file type.

    Attributes:
        name: as llama-quantize calls it.
        number: value of `general.file_type` (`llama_ftype` in include/llama.h).
        default: type of every matrix without a rule of its own.
        rules: rules by the kind of matrix: attn_v, attn_output, ffn_down.
    """

    name: str
    number: int
    default: str
    rules: Mapping[str, Rule] = field(default_factory=dict)


def _always(kind: str) -> Rule:
    return lambda _: kind


def _favoured(better: str, default: str) -> Rule:
    return lambda at: better if at.favoured else default


def _early(fraction: int, better: str, default: str) -> Rule:
    return lambda at: better if at.before(fraction) else default


def _grouped(better: str, default: str) -> Rule:
    return lambda at: better if at.model.gqa >= 4 else default


def _first_layers(count: int, better: str, default: str) -> Rule:
    return lambda at: better if at.layer < count else default


def _iq4(default: str) -> dict[str, Rule]:
    return {"attn_v": _grouped("Q5_K", default), "ffn_down": _early(8, "Q5_K", default)}


FILE_TYPES: Mapping[str, FileType] = {
    kind.name: kind
    for kind in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("Q5_K_M", 17, "Q5_K", {"attn_v": _favoured("Q6_K", "Q5_K"), "ffn_down": _favoured("Q6_K", "Q5_K")}),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q4_K_M", 15, "Q4_K", {"attn_v": _favoured("Q6_K", "Q4_K"), "ffn_down": _favoured("Q6_K", "Q4_K")}),
        FileType(
            "Q4_K_S", 14, "Q4_K", {"attn_v": _first_layers(4, "Q5_K", "Q4_K"), "ffn_down": _early(8, "Q5_K", "Q4_K")}
        ),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("IQ4_NL", 25, "IQ4_NL", _iq4("IQ4_NL")),
        FileType("IQ4_XS", 30, "IQ4_XS", _iq4("IQ4_XS")),
        FileType(
            "Q3_K_L",
            13,
            "Q3_K",
            {"attn_v": _always("Q5_K"), "attn_output": _always("Q5_K"), "ffn_down": _always("Q5_K")},
        ),
        FileType(
            "Q3_K_M",
            12,
            "Q3_K",
            {
                "attn_v": _first_layers(2, "Q5_K", "Q4_K"),
                "attn_output": _always("Q4_K"),
                "ffn_down": _early(16, "Q5_K", "Q4_K"),
            },
        ),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType(
            "Q2_K",
            10,
            "Q2_K",
            {"attn_v": _grouped("Q4_K", "Q3_K"), "attn_output": _always("Q3_K"), "ffn_down": _always("Q3_K")},
        ),
    )
}

_BLOCK = re.compile(r"^blk\.(\d+)\.(attn_v|attn_output|ffn_down)\.weight$")


def tensor_type(name: str, shape: tuple[int, ...], file_type: FileType, model: ModelShape) -> tuple[str, str | None]:
    """The type of one tensor.

    Args:
        name: the tensor's GGUF name.
        shape: its dimensions, outermost first.
        file_type: the file type asked for.
        model: the model's shape.

    Returns:
        The type to store, and the type that the rules asked for if a row is not a multiple of that one's block.
    """
    if len(shape) < 2 or "_norm." in name or not name.endswith(".weight"):
        return "F32", None
    if file_type.default in FLOAT_TYPES:
        return file_type.default, None
    wanted = _wanted(name, shape[-1], file_type, model)
    if shape[-1] % BLOCK_SIZES[wanted][0] == 0:
        return wanted, None
    fallback = FALLBACKS.get(wanted, wanted)
    return (fallback if shape[-1] % BLOCK_SIZES[fallback][0] == 0 else "F16"), wanted


def _wanted(name: str, columns: int, file_type: FileType, model: ModelShape) -> str:
    """The rules proper, before the fallback for unfit shapes."""
    default = file_type.default
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        # The head decides every token, so it gets the best K-quant, or Q8_0 where rows do not fit the default's blocks.
        if columns % BLOCK_SIZES[default][0] != 0:
            return "Q8_0"
        return default if default == "Q8_0" else "Q6_K"
    match = _BLOCK.match(name)
    rule = file_type.rules.get(match[2]) if match else None
    wanted = rule(Position(int(match[1]), model)) if match and rule else default
    if match and match[2] == "attn_v" and model.bump_attn_v and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return wanted


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of `columns` elements."""
    elements, nbytes = BLOCK_SIZES[kind]
    return columns // elements * nbytes
