"""The faults that scripts/sabotage/sabotage.py makes. One more fault is one more entry of `FAULTS`.

A fault is a function that damages a copy of an artifact, or other inputs (`made`) to export the artifact from, or both.
Verification gets the inputs `judged`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.sabotage.damage import Array, Damaged
from scripts.sabotage.statements import (
    NotApplicableError,
    add_bos,
    edit_modelfile,
    end_as_text,
    exchange_merges,
    keep_in_16_bits,
    no_index,
    other_sampling,
    say,
    stray_tensor,
    tie,
    twice_stored,
    unnamed_shard,
    unnamed_tensor,
    wrong_context,
    wrong_eos,
    wrong_epsilon,
    wrong_padding,
    wrong_pre_tokenizer,
    wrong_rope,
    wrong_shard,
    wrong_template,
)

FORMATS = ("gguf", "safetensors", "gptq")
FOLDERS = ("safetensors", "gptq")
SCALED = ("gguf", "gptq")
# Bits of a scale that are seen by limits on errors: of a float16 the sign, the exponent and the upper bit of the
# mantissa. The others move a group by less than rounding it did, and are what the encoder's checksums are for; they are
# flipped in several matrices at once.
SEEN_BITS = range(15, 8, -1)


@dataclass(frozen=True)
class Fault:
    """One way to be wrong.

    Attributes:
        name: what is wrong.
        apply: damages the copy; may do nothing if `made` says it all.
        formats: the formats in which it makes sense.
        quants: the types, None for all of the format.
        made: the inputs that the files come from.
        judged: the inputs that verification is given, and whose manifest the folder gets.
        quant: the type that the files are of, if not the one that they are passed off as.
        parts: of several weights that are damaged, what their names end in: each is to be named in a reason.
        after_encoding: whether it comes after the encoder, whose checksums are not of it then.
        shard: a file of the folder, by its place, that alone comes from `made`; None for all.
    """

    name: str
    apply: Callable[[Damaged], None] = lambda _damaged: None
    formats: tuple[str, ...] = FORMATS
    quants: tuple[str, ...] | None = None
    made: str = "sound"
    judged: str = "sound"
    quant: str | None = None
    parts: tuple[str, ...] = ()
    after_encoding: bool = False
    shard: int | None = None

    def fits(self, format_: str, quant: str) -> bool:
        """Whether it makes sense in an artifact."""
        return format_ in self.formats and (self.quants is None or quant in self.quants)


# --- tensors ---------------------------------------------------------------------------------------------------------


def layer(damaged: Damaged, part: str, number: int | None = None) -> str:
    """Name of a weight of a layer, by default the middle one."""
    layers = int(damaged.config["num_hidden_layers"])
    return f"model.layers.{layers // 2 if number is None else number % layers}.{part}.weight"


def exchange(damaged: Damaged, first: str, second: str) -> None:
    """Exchange two weights that are stored alike."""
    ones, others = damaged.stored(first), damaged.stored(second)
    for part, array in ones.items():
        if array.shape != others[part].shape:
            raise ValueError(f"{first} and {second} are not stored alike")
        kept = array.copy()
        array[...] = others[part]
        others[part][...] = kept


def exchange_q_and_k(damaged: Damaged) -> None:
    """Exchange q and k of a layer; q of two layers where keys are fewer than queries."""
    config = damaged.config
    same = config["num_attention_heads"] == config.get("num_key_value_heads", config["num_attention_heads"])
    if same:
        exchange(damaged, layer(damaged, "self_attn.q_proj"), layer(damaged, "self_attn.k_proj"))
    else:
        exchange(damaged, layer(damaged, "self_attn.q_proj"), layer(damaged, "self_attn.q_proj", 0))


def exchange_norms(damaged: Damaged) -> None:
    """Exchange the two norms of a layer."""
    exchange(damaged, layer(damaged, "input_layernorm"), layer(damaged, "post_attention_layernorm"))


def zero(damaged: Damaged) -> None:
    """A matrix of zeros; of a packed one the scales, which makes it one."""
    parts = damaged.stored(layer(damaged, "mlp.down_proj"))
    parts.get("scales", next(iter(parts.values())))[...] = 0


def noise(damaged: Damaged) -> None:
    """Eight rows of noise of the right size: other rows of the same matrix."""
    parts = damaged.stored(layer(damaged, "mlp.up_proj"))
    # The rows of a packed matrix are its columns.
    array: Array = parts["qweight"].T if "qweight" in parts else parts["weight"]
    array[8:16] = array[-8:][::-1].copy()


def ones_for_norms(damaged: Damaged) -> None:
    """q/k norms of all layers lost: ones are what a model starts with."""
    for weight in _qk_norms(damaged):
        damaged.fill_with_ones(weight)


def no_norms(damaged: Damaged) -> None:
    """q/k norms of all layers under a name that no loader looks for."""
    for weight in _qk_norms(damaged):
        damaged.misname(weight, "_norm", "_form")


def _qk_norms(damaged: Damaged) -> Iterator[str]:
    for number in range(int(damaged.config["num_hidden_layers"])):
        for part in ("self_attn.q_norm", "self_attn.k_norm"):
            if not damaged.has(layer(damaged, part, number)):
                raise NotApplicableError(f"{damaged.config['model_type']} has no {part}")
            yield layer(damaged, part, number)


def truncate(damaged: Damaged) -> None:
    """Cut the last tensor short."""
    last = max((one for one in damaged.places.values() if one.file == damaged.shards[-1]), key=lambda one: one.end)
    with damaged.own(last.file).open("r+b") as stream:
        stream.truncate(last.end - 32)


# --- scales ----------------------------------------------------------------------------------------------------------


def flip_bit(damaged: Damaged, bit: int, part: str = "self_attn.q_proj") -> None:
    """Flip a bit of one float16 scale of one matrix; of a type without scales, of one element."""
    parts = damaged.stored(layer(damaged, part))
    if "scales" in parts:
        parts["scales"].view("<u2")[-1, 7] ^= 1 << bit
    elif damaged.format == "gguf":
        # A block begins with its scale in Q8_0, Q5_0 and Q4_K.
        parts["weight"][5, bit // 8] ^= 1 << bit % 8
    else:
        parts["weight"][5, 7] ^= 1 << bit


# Matrices that no mixed type gives more bits than the others, and as many as reasons are named.
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def flip_bits(damaged: Damaged, bits: Sequence[int]) -> None:
    """Flip bits of scales, each in a matrix of its own, which reasons name."""
    for bit, part in zip(bits, MATRICES, strict=False):
        flip_bit(damaged, bit, part)


def exchange_scales(damaged: Damaged) -> None:
    """Exchange the scales of two groups: of every row of a packed matrix, of one row of a GGUF matrix."""
    parts = damaged.stored(layer(damaged, "mlp.down_proj"))
    if "scales" in parts:
        scales = parts["scales"]
        scales[[0, -1]] = scales[[-1, 0]]
        return
    # A float16 at the start of each block of 34 (Q8_0) or at its end (Q6_K, 210): the widest and the narrowest.
    kind = damaged.places[damaged.parts(layer(damaged, "mlp.down_proj"))["weight"]].kind
    size, offset = {"Q8_0": (34, 0), "Q6_K": (210, 208), "Q4_K": (144, 0), "Q5_0": (22, 0)}[kind]
    row = parts["weight"][3].reshape(-1, size)[:, offset : offset + 2]
    values = row.copy().view("<f2").ravel().astype(float)
    widest, narrowest = abs(values).argmax(), abs(values).argmin()
    row[[widest, narrowest]] = row[[narrowest, widest]]


def shift_zeros(damaged: Damaged, by: int) -> None:
    """Move every zero point of a packed matrix by one; there must be room below and above."""
    bits = int(damaged.quantization["bits"])
    ones = sum(1 << start for start in range(0, 32, bits))
    zeros = damaged.stored(layer(damaged, "mlp.down_proj"))["qzeros"].view("<u4")
    zeros += np.uint32(by * ones & 0xFFFFFFFF)


def shift_all_zeros(damaged: Damaged) -> None:
    """v1 zero points where the configuration says v2: every one is off by one, everywhere."""
    say(damaged, {"checkpoint_format": "gptq_v2"})


def reverse_groups(damaged: Damaged) -> None:
    """`g_idx` the other way round."""
    parts = damaged.stored(layer(damaged, "self_attn.o_proj"))
    parts["g_idx"][...] = parts["g_idx"][::-1].copy()


# --- types -----------------------------------------------------------------------------------------------------------


def call_it_q4(damaged: Damaged) -> None:
    """Say in the file, too, that it is Q4_K_M."""
    damaged.set_number("general.file_type", 15)


def swap_shard(damaged: Damaged, shard: int, source: Path) -> None:
    """Take one file of a folder from another export."""
    name = damaged.shards[shard].name
    damaged.replace(name, source / name)


def _statements() -> Iterator[Fault]:
    """What files say of themselves."""
    gguf, gptq = ("gguf",), ("gptq",)
    yield Fault("a token added before every prompt", add_bos, gguf)
    yield Fault("token that ends a turn typed as text", end_as_text, gguf)
    yield Fault("padding of another model", wrong_padding, gguf)
    yield Fault("sampling defaults of another model", other_sampling, gguf)
    for name, pattern, replacement in (
        ("without stop texts", r"^PARAMETER stop [^\n]*\n", ""),
        ("with another template", r'^TEMPLATE .*"""$', 'TEMPLATE """{{ .Prompt }}"""'),
        ("with another temperature", r"^PARAMETER temperature .*?$", "PARAMETER temperature 1.4"),
    ):
        edit = partial(edit_modelfile, pattern=pattern, replacement=replacement)
        yield Fault(f"Modelfile {name}", edit, gguf)
    yield Fault("index deleted", no_index, FOLDERS)
    yield Fault("index without a tensor", unnamed_tensor, FOLDERS)
    yield Fault("index that names another shard", wrong_shard, FOLDERS)
    yield Fault("a tensor in two shards", twice_stored, FOLDERS)
    yield Fault("a shard that the index does not name", unnamed_shard, FOLDERS)
    yield Fault("a tensor that is not the model's", stray_tensor, FOLDERS)
    yield Fault("one matrix left in 16 bits", keep_in_16_bits, gptq)
    falsified: tuple[dict[str, Any], ...] = (
        {"sym": False},
        {"desc_act": True},
        {"lm_head": True},
        {"quant_method": "awq"},
    )
    for said in falsified:
        ((key, value),) = said.items()
        yield Fault(f"{key} said to be {str(value).lower()}", partial(say, changes=said), gptq)
    others: tuple[dict[str, Any], ...] = ({"bits": 8}, {"group_size": 32}, {"checkpoint_format": "gptq_v2"})
    for other in others:
        (key,) = other
        yield Fault(f"{key} of another type in config.json alone", partial(say, changes=other, older=False), gptq)
    kept: dict[str, Any] = {r"-:.*\.1\.mlp\.": {}}
    eight: dict[str, Any] = {r"+:.*\.1\.mlp\.": {"bits": 8}}
    yield Fault("a rule that keeps packed matrices", partial(say, changes={"dynamic": kept}), gptq)
    yield Fault("a rule for bits that are not stored", partial(say, changes={"dynamic": eight}), gptq)


def _bits() -> Iterator[Fault]:
    for bit in SEEN_BITS:
        what = "sign" if bit == 15 else f"exponent, 2^{bit - 10}" if bit > 9 else "upper bit of the mantissa"
        yield Fault(f"bit {bit} of a scale flipped ({what})", partial(flip_bit, bit=bit), SCALED)
    for bits in ((8, 7, 6, 5, 4), (3, 2, 1, 0)):
        parts = MATRICES[: len(bits)]
        each = ", ".join(f"{bit} ({part.split('.')[1]})" for bit, part in zip(bits, parts, strict=True))
        name = f"bits of scales flipped after encoding: {each}"
        yield Fault(name, partial(flip_bits, bits=bits), SCALED, parts=parts, after_encoding=True)
    for bit in (15, 14, 7, 6, 0):
        yield Fault(f"bit {bit} of an element flipped", partial(flip_bit, bit=bit), ("safetensors",))


FAULTS: tuple[Fault, ...] = (
    Fault("adapter applied twice", made="twice"),
    Fault("adapter left out", made="left out"),
    Fault("scale off by sqrt(r)", made="other scale"),
    Fault("another adapter", made="another"),
    Fault("q and k of a layer, or q of two, exchanged", exchange_q_and_k),
    Fault("norms of a layer exchanged", exchange_norms),
    Fault("one matrix of zeros", zero),
    Fault("eight rows of noise", noise),
    Fault("q/k norms lost", ones_for_norms),
    Fault("q/k norms missing", no_norms),
    Fault("last tensor truncated", truncate),
    Fault("rope base wrong", wrong_rope),
    Fault("norm epsilon wrong", wrong_epsilon),
    Fault("context length wrong", wrong_context),
    Fault("head tied, and the model's is not", made="tied", judged="untied"),
    Fault("head tied by config.json, but stored", tie, FOLDERS, judged="untied", made="untied"),
    Fault("adapter of the head left out", judged="head adapter"),
    Fault("first and last merges exchanged", partial(exchange_merges, first=0, second=-1)),
    Fault("two neighbouring merges exchanged", partial(exchange_merges, first=-2, second=-1)),
    Fault("pre-tokenizer of another model", wrong_pre_tokenizer),
    Fault("chat template of another model", wrong_template),
    Fault("eos of another model", wrong_eos),
    Fault("eos of another model in config.json alone", partial(wrong_eos, generation=False), FOLDERS),
    Fault("eos of another model in generation_config.json alone", partial(wrong_eos, config=False), FOLDERS),
    Fault("one shard from a run without adapter", formats=FOLDERS, made="left out", shard=1),
    Fault("one shard from a run with another adapter", formats=FOLDERS, made="another", shard=1),
    Fault("Q2_K named Q4_K_M", formats=("gguf",), quants=("Q4_K_M",), quant="Q2_K"),
    Fault("Q2_K that says it is Q4_K_M", call_it_q4, ("gguf",), ("Q4_K_M",), quant="Q2_K"),
    Fault("zero points of a matrix one more", partial(shift_zeros, by=1), ("gptq",)),
    Fault("zero points of a matrix one less", partial(shift_zeros, by=-1), ("gptq",)),
    Fault("all zero points one off (v1 named v2)", shift_all_zeros, ("gptq",)),
    Fault("g_idx reversed", reverse_groups, ("gptq",)),
    Fault("scales of two groups exchanged", exchange_scales, SCALED),
    *_bits(),
    *_statements(),
)
