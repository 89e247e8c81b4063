"""The layout of a GPTQ checkpoint, as AutoGPTQ made it and GPTQModel, vLLM and transformers read it.

Codes are little-endian bit streams: of a column's 32 consecutive codes (along the inputs for `qweight`, along the
outputs for `qzeros`) the first one has the lowest bits, and `bits` words of 32 bits hold them without gaps. For 2, 4
and 8 bits no code crosses a word; for 3 bits codes 10 and 21 do. Facts read from GPTQModel 7.6.0,
nn_modules/qlinear/__init__.py (`pack_original`, `dequantize_weight`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from exporter.backends.gptq.names import WORD_BITS, packing_multiple
from exporter.backends.gptq.solver.grid import check_bits
from exporter.errors import RefusalError

CheckpointFormat = Literal["gptq", "gptq_v2"]


class PackingError(RefusalError):
    """Codes, zeros, scales or words whose shapes or values do not fit the layout."""


@dataclass(frozen=True)
class Packed:
    """The tensors of one linear layer in a checkpoint.

    Attributes:
        qweight: int32, shape (in_features * bits / 32, out_features).
        qzeros: int32, shape (groups, out_features * bits / 32); format `gptq` stores the zero point less one.
        scales: float16, shape (groups, out_features).
        g_idx: int32, shape (in_features,): the group of each input column.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


@dataclass(frozen=True)
class Unpacked:
    """What a `Packed` stands for; see `exporter.backends.gptq.solver.Quantized`.

    Attributes:
        codes: uint8, shape (out_features, in_features).
        zeros: uint8, shape (out_features, groups).
        scales: float32 with float16 values, shape (out_features, groups).
        g_idx: int32, shape (in_features,).
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    checkpoint_format: CheckpointFormat = "gptq",
) -> Packed:
    """Pack one linear layer.

    Args:
        codes: uint8, shape (out_features, in_features), in the columns' own order.
        scales: values that float16 holds exactly, shape (out_features, groups).
        zeros: uint8, shape (out_features, groups).
        g_idx: integers, shape (in_features,), each less than groups.
        bits: bits of a code: 2, 3, 4 or 8.
        checkpoint_format: `gptq` stores zero - 1, wrapping within the bits, `gptq_v2` the zero itself. Readers of
            `gptq` disagree about a zero that wraps; `search_scales` never returns one.

    Raises:
        GridError: another number of bits.
        PackingError: shapes that contradict each other; in or out features that do not fill whole words; a code or
            zero of more than `bits` bits; a scale that float16 cannot hold; a group that does not exist.
    """
    check_bits(bits)
    out_features, in_features = _check_codes(codes, bits)
    groups = scales.shape[-1]
    _check_shape("scales", scales, (out_features, groups))
    _check_shape("zeros", zeros, (out_features, groups))
    _check_shape("g_idx", g_idx, (in_features,))
    _check_values("codes", codes, 0, 2**bits - 1)
    _check_values("zeros", zeros, 0, 2**bits - 1)
    _check_values("g_idx", g_idx, 0, groups - 1)
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales) or not bool(half.isfinite().all()):
        raise PackingError(
            "scales",
            found="a value that float16 cannot hold",
            expected="scales rounded to float16",
            remedy="Round the scales before choosing codes with them.",
        )
    stored_zeros = zeros.to(torch.int32)
    if _stores_less_one(checkpoint_format):
        stored_zeros = (stored_zeros - 1) & (2**bits - 1)
    return Packed(
        qweight=pack_words(codes.T, bits),
        qzeros=pack_words(stored_zeros, bits).T.contiguous(),
        scales=half.T.contiguous(),
        g_idx=g_idx.to(torch.int32, copy=True),
    )


def unpack(packed: Packed, bits: int, checkpoint_format: CheckpointFormat = "gptq") -> Unpacked:
    """The inverse of `pack`.

    Raises:
        GridError: another number of bits.
        PackingError: shapes that contradict each other.
    """
    check_bits(bits)
    if packed.qweight.ndim != 2 or packed.qweight.shape[0] * WORD_BITS % bits:
        raise PackingError(
            "qweight",
            found=f"shape {tuple(packed.qweight.shape)}",
            expected=f"(in_features * {bits} / 32, out_features)",
            remedy="Check that the file was written with that number of bits.",
        )
    in_features, out_features = packed.qweight.shape[0] * WORD_BITS // bits, packed.qweight.shape[1]
    groups = packed.scales.shape[0]
    _check_shape("qzeros", packed.qzeros, (groups, out_features * bits // WORD_BITS))
    _check_shape("scales", packed.scales, (groups, out_features))
    _check_shape("g_idx", packed.g_idx, (in_features,))
    zeros = unpack_words(packed.qzeros.T, bits)
    if _stores_less_one(checkpoint_format):
        zeros = (zeros + 1) & (2**bits - 1)
    return Unpacked(
        codes=unpack_words(packed.qweight, bits).T.contiguous(),
        zeros=zeros.contiguous(),
        scales=packed.scales.T.to(torch.float32).contiguous(),
        g_idx=packed.g_idx,
    )


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first dimension.

    Args:
        codes: integers of `bits` bits, shape (n, columns), n a multiple of 32 / bits, for 3 bits of 32.
        bits: 2, 3, 4 or 8.

    Returns:
        int32, shape (n * bits / 32, columns).
    """
    step, words = _period(bits)
    runs = codes.to(torch.int32).reshape(-1, step, codes.shape[1])
    packed = torch.zeros(runs.shape[0], words, codes.shape[1], dtype=torch.int32, device=codes.device)
    for index in range(step):
        word, shift = divmod(index * bits, WORD_BITS)
        packed[:, word] |= runs[:, index] << shift
        if shift + bits > WORD_BITS:
            packed[:, word + 1] |= runs[:, index] >> (WORD_BITS - shift)
    return packed.reshape(-1, codes.shape[1])


def unpack_words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_words`: int32 words (n * bits / 32, columns) → uint8 codes (n, columns)."""
    step, words = _period(bits)
    runs = packed.reshape(-1, words, packed.shape[1])
    codes = torch.empty(runs.shape[0], step, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for index in range(step):
        word, shift = divmod(index * bits, WORD_BITS)
        code = runs[:, word] >> shift
        spilled = shift + bits - WORD_BITS
        if spilled > 0:
            # The shift of a negative word fills with ones: keep only the bits that belong to the code.
            code = (code & ((1 << (bits - spilled)) - 1)) | (runs[:, word + 1] << (bits - spilled))
        codes[:, index] = code & (2**bits - 1)
    return codes.reshape(-1, packed.shape[1])


def _period(bits: int) -> tuple[int, int]:
    """Codes and words after which the pattern repeats."""
    codes = packing_multiple(bits)
    return codes, codes * bits // WORD_BITS


def _stores_less_one(checkpoint_format: str) -> bool:
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise PackingError(
            "checkpoint format", found=checkpoint_format, expected="gptq or gptq_v2", remedy="Choose one of them."
        )
    return checkpoint_format == "gptq"


def _check_codes(codes: torch.Tensor, bits: int) -> tuple[int, int]:
    multiple = packing_multiple(bits)
    if codes.ndim != 2 or codes.shape[0] % multiple or codes.shape[1] % multiple or 0 in codes.shape:
        raise PackingError(
            "codes",
            found=f"shape {tuple(codes.shape)}",
            expected=f"(out_features, in_features), both multiples of {multiple} for {bits} bits",
            remedy="Leave this module in 16 bits, or choose other bits.",
        )
    return codes.shape[0], codes.shape[1]


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise PackingError(
            name, found=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}", remedy="Give tensors of one layer."
        )


def _check_values(name: str, tensor: torch.Tensor, low: int, high: int) -> None:
    if tensor.numel() == 0:
        raise PackingError(name, found="no elements", expected="at least one", remedy="Give tensors of one layer.")
    found_low, found_high = (int(value) for value in torch.aminmax(tensor))
    if found_low < low or found_high > high:
        raise PackingError(
            name,
            found=f"values from {found_low} to {found_high}",
            expected=f"{low} to {high}",
            remedy="Give tensors of one layer, quantized with that number of bits.",
        )
