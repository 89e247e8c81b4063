"""Packed GPTQ layers as plain float32 weights, by the description of the format alone and with numpy.

Nothing of the packing or of the solver is used: what this reads back is what the bytes say. The format, of a linear
layer with `in` inputs and `out` outputs:

    qweight  int32 (in * bits / 32, out)      each column is a stream of bits, lowest first: the codes of its inputs
    qzeros   int32 (groups, out * bits / 32)  each row likewise: the zero points of its outputs; `gptq` stores zero - 1,
                                              `gptq_v2` the zero itself
    scales   float16 (groups, out)
    g_idx    int32 (in)                       the group of each input; without it, groups are runs of `group_size`

    weight[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o])
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from exporter.errors import ArtifactError

Stored = TypeVar("Stored")

PARTS = ("qweight", "qzeros", "scales", "g_idx")
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
_WORD_BITS = 32


def unpack_stream(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.int32]:
    """Read rows of words as streams of bits.

    Args:
        words: int32, shape (rows, n * bits / 32).
        bits: bits of a code.

    Returns:
        Codes, shape (rows, n).

    Raises:
        ArtifactError: the words do not hold whole codes.
    """
    rows, count = words.shape
    if count * _WORD_BITS % bits:
        raise _contradiction(f"{count} words of {_WORD_BITS} bits", f"whole codes of {bits} bits")
    # After so many codes the pattern repeats, `period` words later.
    step = _WORD_BITS // gcd(_WORD_BITS, bits)
    period = step * bits // _WORD_BITS
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((rows, count * _WORD_BITS // bits), dtype=np.int32)
    for index in range(step):
        word, shift = divmod(index * bits, _WORD_BITS)
        found = unsigned[:, word::period] >> np.uint32(shift)
        if shift + bits > _WORD_BITS:
            found |= unsigned[:, word + 1 :: period] << np.uint32(_WORD_BITS - shift)
        codes[:, index::step] = found & np.uint32(2**bits - 1)
    return codes


def unpack_layer(
    parts: Mapping[str, npt.NDArray[Any]], bits: int, group_size: int, checkpoint_format: str = "gptq"
) -> npt.NDArray[np.float32]:
    """The weights of one layer.

    Args:
        parts: its tensors by the names of `PARTS`; `g_idx` may be missing.
        bits: bits of a code.
        group_size: inputs in a group; -1 for all. Only used without g_idx.
        checkpoint_format: gptq or gptq_v2.

    Returns:
        float32, shape (out, in).

    Raises:
        ArtifactError: the tensors contradict each other, or a zero point cannot be told.
    """
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise _contradiction(f"checkpoint format {checkpoint_format}", " or ".join(CHECKPOINT_FORMATS))
    codes = unpack_stream(parts["qweight"].T, bits)
    outputs, inputs = codes.shape
    zeros = unpack_stream(parts["qzeros"], bits)
    scales = parts["scales"].astype(np.float32)
    if zeros.shape != scales.shape or scales.shape[1] != outputs:
        raise _contradiction(f"zeros {zeros.shape} and scales {scales.shape}", f"the same, for {outputs} outputs")
    if checkpoint_format == "gptq":
        # Some readers add one within the bits, some carry into the neighbour: such a file has no one meaning.
        if (zeros == 2**bits - 1).any():
            raise _contradiction("a stored zero point that overflows when one is added", "one less than a zero point")
        zeros = zeros + 1
    size = inputs if group_size == -1 else group_size
    groups = parts["g_idx"] if "g_idx" in parts else np.arange(inputs) // size
    if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= scales.shape[0]:
        raise _contradiction(
            f"g_idx of {groups.shape} up to {groups.max()}", f"{inputs} inputs in {scales.shape[0]} groups"
        )
    order = np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)
    weights: npt.NDArray[np.float32] = order[0][:, groups] * (codes - order[1][:, groups]).astype(np.float32)
    return weights


def parts_of(tensors: Mapping[str, Stored], module: str) -> dict[str, Stored]:
    """What there is of a packed layer among stored tensors, by the names of `PARTS`; nothing if it is not packed."""
    return {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}


def bits_of(parts: Mapping[str, tuple[int, ...]], default: int) -> int:
    """Bits of a layer's codes by the shapes of its tensors: rules may give a layer other bits than the model."""
    if "g_idx" not in parts:
        return default
    return parts["qweight"][0] * _WORD_BITS // parts["g_idx"][0]


def _contradiction(found: str, expected: str) -> ArtifactError:
    return ArtifactError(
        "packed layer", found=found, expected=expected, remedy="The folder is damaged, or of another format."
    )
