"""Whether stored codes and scales are those that ggml makes of the merged values, without quantizing them again.

What takes ggml long is its search for scales. What it does with them then takes one look to check
(`quantize_row_*` in ggml/src/ggml-quants.c of llama.cpp):

- K-quants, with an importance matrix or without: a code is the nearest to (value - offset) / scale by the stored
  scales, or the last one in the direction of a value beyond all codes.
- Q8_0, and Q4_0, Q4_1, Q5_0 and Q5_1 without an importance matrix: scale and offset are known from the values
  (`exporter.backends.gguf.blocks.scales`), and codes are the nearest by those before they were rounded to float16.
- Q4_0, Q4_1, Q5_0 and Q5_1 with an importance: scale and offset are known from values and codes.
- IQ4_NL and IQ4_XS: codes are the nearest by the scale before it was rounded to float16
  (`quantize_row_iq4_nl_impl`).

Of the codebooks of IQ1, IQ2 and IQ3 nothing is known without the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce

import numpy as np
import torch

from exporter.backends.gguf.blocks.layouts import CODINGS, Bytes, Floats
from exporter.backends.gguf.blocks.scales import (
    ROUNDED,
    Groups,
    Line,
    extreme_line,
    fitted_lines,
    fitted_scale,
    rounds_to,
    weights_of,
)
from exporter.backends.weight_reader import NAMED_GROUPS, ImpossibleGroups
from exporter.inputs.row_blocks import Workspace

# `nearest_int` rounds by adding 1.5 · 2^23: what it says of larger ratios is something else.
_LARGEST_RATIO = 2.0**22
# `kvalues_iq4nl` (ggml/src/ggml-common.h)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Values that are looked at together: what is computed of them stays in a cache.
_TILE = 1 << 17
# How far what ggml and we compute of values to round them may be off, as a share of the largest.
_NEAR = 4 * ROUNDED
# Columns from which on torch takes the largest at full speed.
_WIDE = 32
# Eight true ones, as one number.
_ALL_TRUE = 0x0101010101010101


@dataclass(frozen=True)
class _Unfit:
    """Numbers of groups, int64 in ascending order, and what is wrong with the one at a place among them, in words."""

    groups: torch.Tensor
    words: Callable[[int], str]


def impossible_groups(
    kind: str,
    raw: Bytes,
    stored: Floats,
    merged: Floats,
    *,
    noise: float = 0.0,
    first: int = 0,
    weighed: bool = False,
    importance: Floats | None = None,
    workspace: Workspace | None = None,
) -> ImpossibleGroups:
    """Groups of columns whose codes or scale ggml does not make of the merge.

    Args:
        kind: the type; of types that are not checked, nothing is found.
        raw: stored rows, uint8 [rows, bytes of a row], contiguous.
        stored: their values, float32 [rows, columns], contiguous.
        merged: the merged rows, likewise.
        noise: how far those that were quantized may be off these, as a share of the largest of their group.
        first: number of the first row.
        weighed: whether they were quantized with an importance.
        importance: that, float32 [columns] or [rows, columns]; None if it is not known. Types whose scales depend on
            it are not checked then.
        workspace: where intermediate arrays go.
    """
    coding = CODINGS.get(kind)
    if coding is None:
        return ImpossibleGroups()
    blocks = raw.reshape(-1, coding.nbytes)
    # Scales of a damaged block may overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        scale, offset = coding.scales(blocks)
    groups = Groups(
        coding,
        torch.from_numpy(stored).view(-1, coding.group),
        torch.from_numpy(scale).view(-1),
        None if offset is None else torch.from_numpy(offset).view(-1),
    )
    values = torch.from_numpy(merged).view(-1, coding.group)
    unfit: tuple[_Unfit, ...] = ()
    if kind.startswith("IQ4"):
        unfit = (_far_uneven(groups, values, _rounded_by(blocks) + (noise + _NEAR)),)
    elif kind.endswith("_K"):
        unfit = (_far(groups, values, _Rule.of(groups, None, noise), workspace or Workspace()),)
    elif not weighed or kind == "Q8_0":
        line = extreme_line(groups, values, noise)
        unfit = (
            _wrong(groups, [line]),
            _far(groups, values, _Rule.of(groups, line, noise), workspace or Workspace()),
        )
    elif importance is not None:
        weights = weights_of(torch.from_numpy(merged), torch.from_numpy(importance)).view(-1, coding.group)
        fit = (groups, values, weights, noise)
        unfit = (_wrong(groups, [fitted_scale(*fit)] if offset is None else fitted_lines(*fit)),)
    return _named(unfit, coding.group, first, merged.shape[1])


@dataclass(frozen=True)
class _Rule:
    """By which scale and offset codes are the nearest, all float32 [groups].

    Attributes:
        scale: between values of neighbouring codes.
        offset: value of the code zero; None if that is zero.
        factor: of stored values, where these have another scale; else None.
        shift: what is added to them then; None for nothing.
        limit: how far a value may be from that of its code.
    """

    scale: torch.Tensor
    offset: torch.Tensor | None
    factor: torch.Tensor | None
    shift: torch.Tensor | None
    limit: torch.Tensor

    @classmethod
    def of(cls, groups: Groups, line: Line | None, noise: float) -> _Rule:
        """By scales and offsets before they were rounded or, if that is None, by the stored ones."""
        scale, offset, factor, shift = groups.scale, groups.offset, None, None
        if line is not None:
            scale, factor = line.scale, line.scale / groups.scale
            if line.offset is not None and offset is not None:
                offset, shift = line.offset, line.offset - offset * factor
            # Beside the value itself, the smallest and the largest one are off, and with these offset and scale.
            noise *= 4
        noise += _NEAR
        limit = scale.abs() * (0.5 + noise * max(-groups.coding.lowest, groups.coding.highest))
        if offset is not None:
            limit += noise * offset.abs()
        return cls(scale, offset, factor, shift, limit)

    def part(self, which: slice | torch.Tensor) -> _Rule:
        """That of some groups, by their numbers or as a slice."""
        parts = (self.scale, self.offset, self.factor, self.shift, self.limit)
        scale, offset, factor, shift, limit = (None if one is None else one[which] for one in parts)
        assert scale is not None
        assert limit is not None
        return _Rule(scale, offset, factor, shift, limit)

    def errors(self, stored: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """How far values are from those of their codes, [groups, columns]."""
        if self.factor is None:
            torch.sub(values, stored, out=out)
        else:
            torch.addcmul(values, stored, self.factor[:, None], value=-1, out=out)
        if self.shift is not None:
            out -= self.shift[:, None]
        out.abs_()


def _far(groups: Groups, values: torch.Tensor, rule: _Rule, workspace: Workspace) -> _Unfit:
    """Groups with a code that is not the nearest."""
    far = torch.empty(len(values), dtype=torch.bool)
    step = _TILE // groups.coding.group
    for first in range(0, len(values), step):
        tile = slice(first, first + step)
        part = rule.part(tile)
        errors = workspace.take("errors", torch.float32, tuple(values[tile].shape))
        part.errors(groups.values[tile], values[tile], errors)
        far[tile] = _any_above(errors, part.limit, workspace)
    # Without a scale codes mean nothing.
    few = (far & (groups.scale != 0)).nonzero().view(-1)
    if not len(few):
        return _with_codes(few, torch.empty(0, values.shape[1], dtype=torch.bool))
    return _far_of_few(groups, values, rule.part(few), few)


def _any_above(error: torch.Tensor, limit: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """Whether any of the errors of a group, [groups, columns], is above its limit, [groups]; NaN is."""
    if error.shape[1] >= _WIDE:
        return ~(error.amax(1) <= limit)
    # Reductions of fewer columns take several times as long: eight are looked at as one number.
    within = workspace.take("within", torch.bool, tuple(error.shape))
    np.less_equal(error.numpy(), limit.numpy()[:, None], out=within.numpy())
    return torch.from_numpy(reduce(np.bitwise_and, within.view(torch.int64).numpy().T) != _ALL_TRUE)


def _far_of_few(groups: Groups, values: torch.Tensor, rule: _Rule, few: torch.Tensor) -> _Unfit:
    """Of groups that have errors, those in which not all are of values beyond the codes.

    Args:
        groups: all groups.
        values: the merge, float32 [groups, columns].
        rule: that of the few.
        few: their numbers.
    """
    values, scale = values.index_select(0, few), rule.scale[:, None]
    start = torch.zeros_like(scale) if rule.offset is None else rule.offset[:, None]
    ends = start + scale * groups.coding.lowest, start + scale * groups.coding.highest
    within = torch.minimum(torch.maximum(values, torch.minimum(*ends)), torch.maximum(*ends))
    rule.errors(groups.values.index_select(0, few), within, within)
    found = (~(within.amax(1) <= rule.limit)).nonzero().view(-1)
    beyond = ~(within[found] <= rule.limit[found, None])
    sizes = values[found].abs() + start[found].abs()
    return _with_codes(few[found], beyond & ~(sizes > _LARGEST_RATIO * scale[found].abs()))


def _far_uneven(groups: Groups, values: torch.Tensor, off: torch.Tensor) -> _Unfit:
    """The same of IQ4, whose codes stand for sixteen values that are not evenly spaced.

    Args:
        groups: groups as they are stored.
        values: the merge, float32 [groups, columns].
        off: of each block, by what share its scale may have been rounded or values be off, float32 [blocks, 1].
    """
    scale = groups.scale
    slack = off.expand(-1, len(scale) // len(off)).reshape(-1, 1)
    inverse = torch.where(scale == 0, 0, 1 / scale)[:, None]
    ratios, codes = values * inverse, (groups.values * inverse).round_()
    valid = codes.abs() <= 127
    index = torch.where(valid, codes, 0).to(torch.int32).add_(127)
    lower, upper = (torch.from_numpy(edges)[index] for edges in _edges())
    room = ratios.abs() * slack + _NEAR * 127
    beyond = ~valid | ~(ratios + room >= lower) | ~(ratios - room <= upper)
    beyond &= (scale != 0)[:, None]
    few = beyond.any(1).nonzero().view(-1)
    return _with_codes(few, beyond[few])


def _rounded_by(blocks: Bytes) -> torch.Tensor:
    """Half of the spacing of the float16 that a block begins with, as a share of it; of zero, nothing."""
    halves = np.abs(np.ascontiguousarray(blocks[:, :2]).view("<f2"))
    halves[~np.isfinite(halves)] = 0
    spacing = np.spacing(halves).astype(np.float32)
    # The share is of the scale before it was rounded, which may be smaller by that much.
    share = np.divide(spacing, 2 * halves.astype(np.float32) - spacing, out=np.zeros_like(spacing), where=halves > 0)
    return torch.from_numpy(share)


@cache
def _edges() -> tuple[Floats, Floats]:
    """By value + 127, between which ratios it is the nearest of IQ4's; of what is none of its values, nowhere."""
    values = np.array(_IQ4_VALUES, np.float32)
    middles = (values[1:] + values[:-1]) / 2
    lower, upper = np.full(255, np.inf, np.float32), np.full(255, -np.inf, np.float32)
    places = values.astype(int) + 127
    lower[places], upper[places] = [-np.inf, *middles], [*middles, np.inf]
    return lower, upper


def _with_codes(groups: torch.Tensor, beyond: torch.Tensor) -> _Unfit:
    """Of some groups, those that have codes `beyond`, bool [groups, columns]."""
    counts, columns = beyond.sum(1), beyond.shape[1]
    found = counts > 0
    groups, counts = groups[found], counts[found]

    def words(place: int) -> str:
        count = int(counts[place])
        return f"{count} of {columns} codes {'is' if count == 1 else 'are'} not the nearest under the stored scale"

    return _Unfit(groups, words)


def _wrong(groups: Groups, lines: Sequence[Line]) -> _Unfit:
    """Groups whose scale and offset are none of those that they may be."""
    wrong = torch.ones_like(groups.scale, dtype=torch.bool)
    for line in lines:
        wrong &= ~line.is_of(groups)
    found, line = wrong.nonzero().view(-1), lines[0]

    def words(place: int) -> str:
        group = found[place]
        what, stored, wanted = "scale", groups.scale[group], line.scale[group]
        right = bool(rounds_to(stored, wanted, line.scale_noise[group]))
        if right and groups.offset is not None and line.offset is not None:
            what, stored, wanted = "minimum", groups.offset[group], line.offset[group]
        return f"the {what} is {float(stored):.5g} and should be {float(wanted):.5g}"

    return _Unfit(found, words)


def _named(unfit: Sequence[_Unfit], group: int, first: int, columns: int) -> ImpossibleGroups:
    """All together; of a group with several faults, the first that is given."""
    words = {
        int(one.groups[place]): partial(one.words, place)
        for one in reversed(unfit)
        for place in range(min(len(one.groups), NAMED_GROUPS))
    }
    named = []
    for number in sorted(words)[:NAMED_GROUPS]:
        row, column = divmod(number * group, columns)
        named.append(f"columns {column} to {column + group - 1} of row {first + row}: {words[number]()}")
    count = len(np.unique(np.concatenate([one.groups.numpy() for one in unfit]))) if named else 0
    return ImpossibleGroups(count, tuple(named))
