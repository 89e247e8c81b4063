"""Names of GPTQ's types: `gptq-int4-g128` is 4 bits in groups of 128 input columns, `gptq-int4-gall` one group for all.

`gptq-` may be left out.
"""

from __future__ import annotations

import re

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
WORD_BITS = 32


def quant_name(bits: int, group_size: int) -> str:
    """The name of a type; group size -1 is all columns."""
    return f"gptq-int{bits}-g{'all' if group_size == -1 else group_size}"


# Widest first, and from small groups to large ones.
QUANTS = tuple(quant_name(bits, group) for bits in reversed(BITS) for group in (*GROUP_SIZES[1:], -1))


def packing_multiple(bits: int) -> int:
    """What in and out features must be a multiple of, so that codes fill whole words of 32 bits."""
    return WORD_BITS if WORD_BITS % bits else WORD_BITS // bits


def parse_quant(name: str) -> tuple[int, int] | None:
    """Bits and group size by a type's name, in any case; None if it is none of `QUANTS`."""
    match = re.fullmatch(r"(?:gptq-)?int(\d)-g(all|\d+)", name.lower())
    if match is None or f"gptq-{match[0].removeprefix('gptq-')}" not in QUANTS:
        return None
    return int(match[1]), -1 if match[2] == "all" else int(match[2])


def bits_tags(name: str) -> tuple[str, ...]:
    """A model card's tags for the bits of a type, such as `4-bit`; empty if it is none of `QUANTS`."""
    parsed = parse_quant(name)
    return (f"{parsed[0]}-bit",) if parsed else ()
