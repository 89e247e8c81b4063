"""The arithmetic: codes of 8 bits and their scales as a dense matrix."""

from __future__ import annotations

import torch

# Codes in a word, and the code of zero, which symmetric GPTQ fixes: vLLM's uint8b128.
CODES_PER_WORD = 4
_BITS = 8
_ZERO = 128


def dense_weight(qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(code - 128) * scale, rounded once to the type of the scales: what vLLM's Marlin kernel multiplies with on a GPU.

    The differences are whole numbers up to 128, which float16 and bfloat16 hold exactly.

    Args:
        qweight: int32, shape (inputs / 4, outputs); four inputs in a word, the first in the lowest bits.
        scales: float16 or bfloat16, shape (groups, outputs); a group is a run of inputs / groups.

    Returns:
        Shape (outputs, inputs), of the type of the scales.

    Raises:
        ValueError: the inputs do not fill whole groups, or the outputs are not the same.
    """
    words, outputs = qweight.shape
    groups, inputs = scales.shape[0], words * CODES_PER_WORD
    if inputs % groups or scales.shape[1] != outputs:
        raise ValueError(f"scales of shape {list(scales.shape)} do not fit {inputs} inputs and {outputs} outputs")
    weight = torch.empty(outputs, words, CODES_PER_WORD, dtype=scales.dtype, device=scales.device)
    # A quarter at a time: the codes of all would take four bytes each.
    for place in range(CODES_PER_WORD):
        weight[:, :, place] = ((qweight >> _BITS * place & (1 << _BITS) - 1) - _ZERO).T
    grouped = weight.view(outputs, groups, inputs // groups)
    grouped *= scales.T.unsqueeze(-1)
    return weight.view(outputs, inputs)
