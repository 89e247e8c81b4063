"""Which type each tensor of a GGUF file gets, given the file type.

The rules are llama.cpp's (`llama_tensor_get_type_impl`, `tensor_type_fallback` and `tensor_requires_imatrix` in
src/llama-quant.cpp of the release inside llama-cpp-python 0.3.36), restricted to Qwen models. They are data here:
for each file type a default and, for the kinds of matrix that are treated otherwise, a rule over the layer's number,
the model, and whether there is an importance matrix.
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
    "IQ4_XS": (256, 136), "IQ3_S": (256, 110), "IQ3_XXS": (256, 98), "IQ2_S": (256, 82), "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66), "IQ1_M": (256, 56), "IQ1_S": (256, 50),
}  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16")

# tensor_type_fallback: what a type becomes when a row is not a multiple of its block.
FALLBACKS: Mapping[str, str] = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_XXS": "IQ4_NL",
    "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL",
}  # fmt: skip

# Types that are garbage without an importance (tensor_requires_imatrix; Q2_K is one of them in a Q2_K_S file alone).
_REQUIRING = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
# Default types whose files llama.cpp decides about in a branch of its own, where Qwen2 with 80 layers is not favoured.
_LOWEST = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})


@dataclass(frozen=True)
class ModelShape:
    """What the rules need to know of the model.

    Attributes:
        layers: number of decoder layers.
        gqa: query heads per key-value head.
        tied: whether the head is the embedding.
        bump_attn_v: whether Q3_K and Q4_K of attn_v become Q5_K, as llama.cpp does for Qwen2 with 80 layers.
        experts: number of experts of a layer, 0 in a dense model.
    """

    layers: int
    gqa: int
    tied: bool
    bump_attn_v: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Position:
    """What a rule looks at: the layer's number (0 outside of the layers), the model, and if there is an imatrix."""

    layer: int
    model: ModelShape
    imatrix: bool = False

    @property
    def favoured(self) -> bool:
        """The first and last eighth of the layers and every third between (`use_more_bits`)."""
        eighth = self.model.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.model.layers // 8 or (self.layer - eighth) % 3 == 2

    def before(self, fraction: int) -> bool:
        """Whether the layer is in the first 1/fraction."""
        return self.layer < self.model.layers // fraction

    @property
    def inner(self) -> bool:
        """Whether the layer is neither in the first nor in the last eighth."""
        return self.model.layers // 8 <= self.layer < 7 * self.model.layers // 8


Rule = Callable[[Position], str]


@dataclass(frozen=True)
class FileType:
    """One file type.

    Attributes:
        name: as llama-quantize calls it.
        number: value of `general.file_type` (`llama_ftype` in include/llama.h).
        default: type of every matrix without a rule of its own.
        rules: rules by the kind of matrix: attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, token_embd
            (if it is not the head), output (the head, or the embedding of a tied model).
        needs_imatrix: whether it is refused without an importance matrix. llama-quantize refuses the same ones but for
            IQ3_S and IQ3_M, in which no matrix is of a type that requires one.
    """

    name: str
    number: int
    default: str
    rules: Mapping[str, Rule] = field(default_factory=dict)
    needs_imatrix: bool = False


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


def _without_imatrix(rule: Rule, default: str) -> Rule:
    return lambda at: default if at.imatrix else rule(at)


def _with_imatrix(rule: Rule, default: str) -> Rule:
    return lambda at: rule(at) if at.imatrix else default


def _iq4(default: str) -> dict[str, Rule]:
    early = _early(8, "Q5_K", default)
    return {"attn_v": _grouped("Q5_K", default), "ffn_down": _without_imatrix(early, default)}


def _guarded(better: str, default: str) -> dict[str, Rule]:
    # "Guard against craziness in the first few ffn_down layers that can happen even with imatrix" (llama-quant.cpp).
    return {"ffn_down": _with_imatrix(_early(8, better, default), default)}


def _eight_experts(better: str, rule: Rule) -> Rule:
    """llama.cpp's rules for models of eight experts, which its authors measured on Mixtral."""
    return lambda at: better if at.model.experts == 8 else rule(at)


def _iq3_xs(at: Position) -> str:
    return "IQ3_XXS" if at.inner else "IQ3_S"


def _lowest(name: str, number: int, default: str, better: str, embedding: str, attn_output: str) -> FileType:
    """One of the six file types of the branch for IQ2 and IQ1."""
    rules = {
        "token_embd": _always(embedding),
        "output": _always("Q5_K"),
        "attn_v": lambda at: "Q4_K" if at.model.gqa >= 4 or at.model.experts >= 4 else better,
        "attn_k": _eight_experts("Q4_K", _always(default)),
        "attn_output": _eight_experts("Q5_K", _always(attn_output)),
        "ffn_down": _early(8, better, default),
    }
    return FileType(name, number, default, rules, needs_imatrix=True)


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
        FileType("Q5_0", 8, "Q5_0", _guarded("Q5_1", "Q5_0")),
        FileType("Q4_K_M", 15, "Q4_K", {"attn_v": _favoured("Q6_K", "Q4_K"), "ffn_down": _favoured("Q6_K", "Q4_K")}),
        FileType(
            "Q4_K_S", 14, "Q4_K", {"attn_v": _first_layers(4, "Q5_K", "Q4_K"), "ffn_down": _early(8, "Q5_K", "Q4_K")}
        ),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q4_0", 2, "Q4_0", _guarded("Q4_1", "Q4_0")),
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
            "IQ3_M",
            27,
            "IQ3_S",
            {
                "attn_v": _always("Q4_K"),
                "attn_output": _always("Q4_K"),
                "ffn_down": lambda at: "Q4_K" if at.before(8) or (at.model.experts == 8 and at.favoured) else "IQ3_S",
            },
            needs_imatrix=True,
        ),
        FileType("IQ3_S", 26, "IQ3_S", {"attn_v": _grouped("Q4_K", "IQ3_S")}, needs_imatrix=True),
        FileType(
            "IQ3_XS",
            22,
            "IQ3_S",
            {
                "attn_q": _always("IQ3_XXS"),
                "attn_k": _always("IQ3_XXS"),
                "attn_v": _grouped("Q4_K", "IQ3_S"),
                "ffn_gate": _iq3_xs,
                "ffn_up": _iq3_xs,
            },
            needs_imatrix=True,
        ),
        FileType(
            "IQ3_XXS",
            23,
            "IQ3_XXS",
            {
                "token_embd": _always("IQ3_S"),
                "output": _always("Q5_K"),
                "attn_q": _always("IQ2_S"),
                "attn_k": _always("IQ2_S"),
                "attn_v": lambda at: "Q4_K" if at.model.gqa >= 4 else "IQ3_XXS" if at.imatrix else "IQ3_S",
                "attn_output": _always("IQ3_S"),
                "ffn_down": _without_imatrix(_early(8, "Q4_K", "Q3_K"), "IQ3_XXS"),
            },
            needs_imatrix=True,
        ),
        FileType(
            "Q2_K",
            10,
            "Q2_K",
            {"attn_v": _grouped("Q4_K", "Q3_K"), "attn_output": _always("Q3_K"), "ffn_down": _always("Q3_K")},
        ),
        FileType(
            "Q2_K_S",
            21,
            "Q2_K",
            {"attn_v": _grouped("Q4_K", "Q2_K"), "ffn_down": _early(8, "Q4_K", "Q2_K")},
            needs_imatrix=True,
        ),
        # IQ2_S is made of IQ2_XS, and IQ2_M of IQ2_S.
        _lowest("IQ2_M", 29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
        _lowest("IQ2_S", 28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
        _lowest("IQ2_XS", 20, "IQ2_XS", "Q2_K", "Q2_K", "IQ2_XS"),
        _lowest("IQ2_XXS", 19, "IQ2_XXS", "Q2_K", "Q2_K", "IQ2_XXS"),
        _lowest("IQ1_M", 31, "IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
        _lowest("IQ1_S", 24, "IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    )
}

# Experts and the shared expert go by the rules of the dense matrix of their kind.
_BLOCK = re.compile(
    r"^blk\.(\d+)\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)(?:_exps|_shexp)?\.weight$"
)
# Never quantized: the router of a mixture of experts.
_ROUTER = "ffn_gate_inp"
# File types whose attn_output becomes Q5_K in models of eight experts.
_EIGHT_EXPERTS_OUTPUT = frozenset({
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
})  # fmt: skip


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: FileType, model: ModelShape, *, imatrix: bool = False
) -> tuple[str, str | None]:
    """The type of one tensor.

    Args:
        name: the tensor's GGUF name.
        shape: its dimensions, outermost first.
        file_type: the file type asked for.
        model: the model's shape.
        imatrix: whether there is an importance matrix, even one without an entry for this tensor.

    Returns:
        The type to store, and the type that the rules asked for if a row is not a multiple of that one's block.
    """
    if len(shape) < 2 or "_norm." in name or not name.endswith(".weight") or _ROUTER in name:
        return "F32", None
    if file_type.default in FLOAT_TYPES:
        return file_type.default, None
    wanted = _wanted(name, shape[-1], file_type, model, imatrix)
    if shape[-1] % BLOCK_SIZES[wanted][0] == 0:
        return wanted, None
    fallback = FALLBACKS.get(wanted, wanted)
    return (fallback if shape[-1] % BLOCK_SIZES[fallback][0] == 0 else "F16"), wanted


def _wanted(name: str, columns: int, file_type: FileType, model: ModelShape, imatrix: bool) -> str:
    """The rules proper, before the fallback for unfit shapes."""
    default = file_type.default
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        # The head decides every token, so it gets the best K-quant, or Q8_0 where rows do not fit the default's blocks.
        if columns % BLOCK_SIZES[default][0] != 0:
            return "Q8_0"
        rule = file_type.rules.get("output", _always(default if default == "Q8_0" else "Q6_K"))
        return rule(Position(0, model, imatrix))
    match = _BLOCK.match(name)
    kind, layer = (match[2], int(match[1])) if match else (name.removesuffix(".weight"), 0)
    wanted = file_type.rules.get(kind, _always(default))(Position(layer, model, imatrix))
    if default in _LOWEST:
        return wanted
    if model.experts == 8:
        return _of_eight_experts(kind, wanted, file_type)
    bumped = kind == "attn_v" and model.bump_attn_v
    return "Q5_K" if bumped and wanted in ("Q3_K", "Q4_K") else wanted


def _of_eight_experts(kind: str, wanted: str, file_type: FileType) -> str:
    """What models of eight experts get in place of the usual type, outside of the branch for IQ2 and IQ1."""
    if kind in ("attn_v", "attn_k"):
        return "Q8_0"
    if kind == "attn_output":
        return "Q5_K" if file_type.name in _EIGHT_EXPERTS_OUTPUT else file_type.default
    return wanted


def has_importance(name: str) -> bool:
    """Whether llama-imatrix collects the inputs of a tensor by default: the matrices of the layers, head and embedding
    not (`IMatrixCollector::collect_imatrix` in tools/imatrix/imatrix.cpp)."""
    return _BLOCK.match(name) is not None


def requires_importance(name: str, kind: str, file_type: FileType) -> bool:
    """Whether llama-quantize refuses to store a tensor of that name in that type without an importance."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    return kind in _REQUIRING or (kind == "Q2_K" and file_type.name == "Q2_K_S")


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of `columns` elements."""
    elements, nbytes = BLOCK_SIZES[kind]
    return columns // elements * nbytes
