"""The layout against two independent readings of it: as one long integer, and for 3 bits as AutoGPTQ's table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.gptq.bit_packing import CheckpointFormat, Packed, PackingError, pack, unpack
from exporter.backends.gptq.names import packing_multiple
from exporter.backends.gptq.solver.grid import GridError

BITS = st.sampled_from([2, 3, 4, 8])
FORMATS: st.SearchStrategy[CheckpointFormat] = st.sampled_from(["gptq", "gptq_v2"])


def layer(bits: int, rows: int, columns: int, groups: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "codes": torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        "scales": torch.randn(rows, groups, generator=generator).half().float(),
        "zeros": torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8),
        "g_idx": torch.randint(0, groups, (columns,), generator=generator, dtype=torch.int32),
    }


def as_integer(words: list[int]) -> int:
    """Signed 32-bit words as one integer, the first word lowest."""
    return sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))


@settings(max_examples=60, deadline=None)
@given(
    bits=BITS,
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    groups=st.integers(1, 4),
    checkpoint_format=FORMATS,
    seed=st.integers(0, 1000),
)
def test_layout_and_round_trip(
    bits: int, blocks: tuple[int, int], groups: int, checkpoint_format: CheckpointFormat, seed: int
) -> None:
    multiple = packing_multiple(bits)
    rows, columns = blocks[0] * multiple, blocks[1] * multiple
    given_layer = layer(bits, rows, columns, groups, seed)
    packed = pack(**given_layer, bits=bits, checkpoint_format=checkpoint_format)
    assert {tensor.dtype for tensor in (packed.qweight, packed.qzeros, packed.g_idx)} == {torch.int32}
    assert packed.scales.dtype == torch.float16
    assert packed.qweight.shape == (columns * bits // 32, rows)
    assert packed.qzeros.shape == (groups, rows * bits // 32)
    for row in range(rows):
        stream = as_integer(packed.qweight[:, row].tolist())
        expected = [int(code) for code in given_layer["codes"][row]]
        assert [(stream >> (bits * index)) % 2**bits for index in range(columns)] == expected
    for group in range(groups):
        stream = as_integer(packed.qzeros[group].tolist())
        less = 1 if checkpoint_format == "gptq" else 0
        expected = [(int(zero) - less) % 2**bits for zero in given_layer["zeros"][:, group]]
        assert [(stream >> (bits * index)) % 2**bits for index in range(rows)] == expected
    back = unpack(packed, bits, checkpoint_format)
    for name, tensor in given_layer.items():
        assert torch.equal(getattr(back, name), tensor), name


def test_three_bits_as_autogptq_places_them() -> None:
    """32 codes in three words: (code, bits of it to skip, bits of it, word, shift), read from AutoGPTQ's pattern."""
    places = [
        *((k, 0, 3, 0, 3 * k) for k in range(10)), (10, 0, 2, 0, 30), (10, 2, 1, 1, 0),
        *((k, 0, 3, 1, 1 + 3 * (k - 11)) for k in range(11, 21)), (21, 0, 1, 1, 31), (21, 1, 2, 2, 0),
        *((k, 0, 3, 2, 2 + 3 * (k - 22)) for k in range(22, 32)),
    ]  # fmt: skip
    given_layer = layer(3, 32, 32, 1, 0)
    packed = pack(**given_layer, bits=3, checkpoint_format="gptq_v2")
    for row in range(32):
        words = [0, 0, 0]
        for code, skip, count, word, shift in places:
            words[word] |= ((int(given_layer["codes"][row, code]) >> skip) & (2**count - 1)) << shift
        assert [int(word) & 0xFFFFFFFF for word in packed.qweight[:, row]] == words


def test_symmetric_four_bit_zeros_are_the_familiar_word() -> None:
    given_layer: dict[str, Any] = layer(4, 8, 8, 1, 0) | {"zeros": torch.full((8, 1), 8, dtype=torch.uint8)}
    assert pack(**given_layer, bits=4).qzeros.tolist() == [[0x77777777]]
    assert pack(**given_layer, bits=4, checkpoint_format="gptq_v2").qzeros.tolist() == [[0x88888888 - 2**32]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(32, 33, dtype=torch.uint8), "g_idx": torch.zeros(33)}, "multiples of 8"),
        ({"codes": torch.zeros(33, 32, dtype=torch.uint8)}, "multiples of 8"),
        ({"codes": torch.full((32, 32), 16, dtype=torch.uint8)}, "0 to 15"),
        ({"zeros": torch.full((32, 2), 16, dtype=torch.uint8)}, "0 to 15"),
        ({"zeros": torch.zeros(32, 3, dtype=torch.uint8)}, r"shape \(32, 2\)"),
        ({"scales": torch.full((32, 2), 1e-3)}, "float16"),
        ({"scales": torch.full((32, 2), float("inf"))}, "float16"),
        ({"scales": torch.full((32, 2), float("nan"))}, "float16"),
        ({"g_idx": torch.full((32,), 2, dtype=torch.int32)}, "0 to 1"),
        ({"g_idx": torch.zeros(31, dtype=torch.int32)}, r"shape \(32,\)"),
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"checkpoint_format": "marlin"}, "gptq or gptq_v2"),
    ],
)
def test_refuses_to_pack_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**layer(4, 32, 32, 2, 0), "bits": 4}
    pack(**arguments)
    with pytest.raises((PackingError, GridError), match=message):
        pack(**(arguments | change))


def test_refuses_to_unpack_what_does_not_fit() -> None:
    given_layer: dict[str, Any] = layer(3, 32, 64, 2, 0)
    packed = pack(**given_layer, bits=3)
    broken: list[Packed] = [
        replace(packed, qweight=packed.qweight[:-1]),
        replace(packed, qzeros=packed.qzeros[:, :-1]),
        replace(packed, scales=packed.scales[:, :-1]),
        replace(packed, g_idx=packed.g_idx[:-1]),
    ]
    for candidate in broken:
        with pytest.raises(PackingError):
            unpack(candidate, 3)
