"""What is found in stored blocks: nothing in sound ones, whatever their values, and every bit that moves a code."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.gguf.blocks.ggml import quantize_rows
from exporter.backends.gguf.blocks.impossible_groups import impossible_groups
from exporter.backends.gguf.blocks.layouts import CODINGS
from exporter.backends.gguf.file_types import BLOCK_SIZES
from exporter.backends.weight_reader import NAMED_GROUPS, ImpossibleGroups
from exporter.inputs.row_blocks import Workspace

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
KINDS = tuple(CODINGS)
# Scales that are computed again from the values alone.
KNOWN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Where a block has its scale and, of some, its minimum, both float16; and its first codes.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
CODES = {
    "Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8, "Q8_0": 2, "Q2_K": 16, "Q3_K": 32, "Q4_K": 16, "Q5_K": 48, "Q6_K": 0,
    "IQ4_NL": 2, "IQ4_XS": 8,
}  # fmt: skip


def quantized(kind: str, values: Floats, importance: Floats | None = None) -> Bytes:
    """Rows by ggml's own quantizer, which can be written to."""
    elements, nbytes = BLOCK_SIZES[kind]
    values = np.ascontiguousarray(values, np.float32)
    (rows, columns), size = values.shape, values.size // elements * nbytes
    raw = quantize_rows(kind, values.ctypes.data, rows, columns, size, importance)
    return np.frombuffer(raw, np.uint8).reshape(len(values), -1)


def dequantized(kind: str, raw: Bytes) -> Floats:
    """Their values by gguf's own dequantizer."""
    # Of damaged scales.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        values: Floats = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return values.astype(np.float32, copy=False)


def found(
    kind: str, raw: Bytes, values: Floats, importance: Floats | None = None, **options: object
) -> ImpossibleGroups:
    known: dict[str, object] = {"weighed": importance is not None, "importance": importance}
    return impossible_groups(kind, raw, dequantized(kind, raw), values, **(known | options))  # type: ignore[arg-type]


def gaussian(rows: int, columns: int = 256, seed: int = 0) -> Floats:
    """As large as weights are."""
    return (0.02 * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)


def uneven(columns: int = 256) -> Floats:
    return np.exp(1.5 * np.random.default_rng(1).standard_normal(columns)).astype(np.float32)


# --- sound blocks ----------------------------------------------------------------------------------------------------


def drawn(shape: str, generator: np.random.Generator, rows: int, columns: int) -> Floats:
    """Values of some shape, of about one."""
    values = generator.standard_normal((rows, columns))
    if shape == "outliers":
        values[generator.random(values.shape) < 0.01] *= 100
    elif shape == "zeros":
        values[:, generator.random(columns // 32).repeat(32) < 0.5] = 0
        values[0] = 0
    elif shape == "constant":
        values = generator.standard_normal((rows, columns // 32)).repeat(32, axis=1)
    elif shape == "nearly constant":
        values = generator.standard_normal((rows, columns // 32)).repeat(32, axis=1) * (1 + 1e-5 * values)
    elif shape == "positive":
        values = np.abs(values)
    elif shape == "negative":
        values = -3 - np.abs(values)
    elif shape == "grid":
        values = np.rint(3 * values) / 100
    elif shape == "equal magnitudes":
        values = np.sign(values)
    elif shape == "scales of their own":
        values *= np.exp(2 * generator.standard_normal((rows, columns // 16))).repeat(16, axis=1)
    return values.astype(np.float32)


SHAPES = (
    "gaussian", "outliers", "zeros", "constant", "nearly constant", "positive", "negative", "grid", "equal magnitudes",
    "scales of their own",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    # From float32 values without a float16 scale, over scales that are subnormal, to large ones.
    magnitude=st.sampled_from([-38, -9, -7, -6, -4, -2, 0, 2]),
    spread=st.sampled_from([None, 0.0, 1.0, 4.0]),
    unseen=st.sampled_from([0.0, 0.5, 1.0]),
    noise=st.sampled_from([0.0, 5e-7, 4e-6]),
)
def test_nothing_is_found_in_sound_blocks(
    kind: str, seed: int, shape: str, magnitude: int, spread: float | None, unseen: float, noise: float
) -> None:
    """With importances and without; also where the merge was computed elsewhere and has other last bits."""
    generator = np.random.default_rng(seed)
    # Minima are float16, too.
    values = np.clip(drawn(shape, generator, 4, 512) * 10.0**magnitude, -3e4, 3e4).astype(np.float32)
    importance = None
    if spread is not None:
        importance = np.exp(spread * generator.standard_normal(512)).astype(np.float32)
        importance[generator.random(512) < unseen] = 0
    raw = quantized(kind, values, importance)
    merged = (values * (1 + noise * generator.uniform(-1, 1, values.shape))).astype(np.float32)
    assert found(kind, raw, merged, importance, noise=noise) == ImpossibleGroups()


@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_offsets_are_those_of_whole_codes(kind: str) -> None:
    """Against gguf's own dequantizer: every value is scale · code + offset with a code of the type's."""
    coding = CODINGS[kind]
    raw = quantized(kind, gaussian(16, 512))
    scale, offset = coding.scales(raw.reshape(-1, coding.nbytes))
    start = 0 if offset is None else offset.reshape(-1, 1).astype(np.float64)
    codes = (dequantized(kind, raw).reshape(-1, coding.group) - start) / scale.reshape(-1, 1).astype(np.float64)
    assert np.abs(codes - np.rint(codes)).max() < 1e-4
    assert (round(codes.min()), round(codes.max())) == (coding.lowest, coding.highest)


# --- flipped bits ----------------------------------------------------------------------------------------------------


def flipped(raw: Bytes, kind: str, byte: int, bit: int) -> Bytes:
    """A bit of every block flipped."""
    blocks = raw.copy().reshape(-1, CODINGS[kind].nbytes)
    blocks[:, byte + bit // 8] ^= np.uint8(1 << bit % 8)
    return blocks.reshape(raw.shape)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_every_bit_of_a_known_scale_is_seen(kind: str, weighed: bool) -> None:
    """But where what it should be lies so close to the middle of two float16 that another processor may take either.

    With importances, lines through few columns that count are known less exactly.
    """
    values, importance = gaussian(64), uneven() if weighed else None
    raw = quantized(kind, values, importance)
    groups = values.size // 32
    least = 0.8 if weighed and len(SCALES[kind]) > 1 else 0.97
    for byte in SCALES[kind]:
        counts = [found(kind, flipped(raw, kind, byte, bit), values, importance).count for bit in range(16)]
        assert counts[0] >= least * groups
        # An infinite scale fits nothing, or a line of which nothing is known.
        assert min(counts[1:]) >= (0.99 if weighed else 1) * groups


# Shares of blocks in which a flip of bits 0, 1, 2 … is seen at least: those measured of 384 Gaussian ones less a tenth.
LEAST = {
    "Q2_K": (0.05, 0.1, 0.25, 0.45, 0.75, 0.9), "Q3_K": (0.05, 0.1, 0.25, 0.5, 0.75, 0.9),
    "Q4_K": (0.3, 0.55, 0.8, 0.9), "Q5_K": (0.65, 0.85, 0.9), "Q6_K": (0.9,),
    "IQ4_NL": (0.0, 0.0, 0.0, 0.1, 0.3, 0.6, 0.85, 0.95), "IQ4_XS": (0.4, 0.8, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(LEAST))
def test_a_bit_of_another_scale_is_seen_where_it_moves_a_code(kind: str) -> None:
    """From the bits that nearly always do, in nearly every block; where one is not seen, the codes fit both scales."""
    coding, rows = CODINGS[kind], 48
    values = gaussian(rows)
    raw = quantized(kind, values)
    blocks_a_row = raw.shape[1] // coding.nbytes
    workspace = Workspace()
    for byte in SCALES[kind]:
        for bit in range(10):
            changed = flipped(raw, kind, byte, bit)
            stored = dequantized(kind, changed)
            # One block of each row at a time is damaged: rows are looked at by themselves.
            seen = [
                bool(impossible_groups(kind, changed[row : row + 1], stored[row : row + 1], values[row : row + 1],
                             workspace=workspace).count)
                for row in range(rows)
            ]  # fmt: skip
            expected = dict(enumerate(LEAST[kind])).get(bit, 0.95)
            share = np.mean(seen) if blocks_a_row == 1 else 1 - (1 - np.mean(seen)) ** (1 / blocks_a_row)
            # A scale without bits left is zero, and codes then mean nothing: that is for the limits on errors.
            if np.abs(stored).max(axis=1).min() > 0:
                assert share >= expected - 1e-9, (byte, bit, share)
            if not kind.startswith("IQ4"):
                for row in np.flatnonzero(~np.array(seen)):
                    assert farthest(kind, changed[row], values[row]) <= 0.501


def farthest(kind: str, raw: Bytes, values: Floats) -> float:
    """How far a value of a row is from that of its code, in steps and float64, unless it is beyond all codes."""
    coding = CODINGS[kind]
    scale, offset = coding.scales(raw.reshape(-1, coding.nbytes))
    scale = scale.reshape(-1, 1).astype(np.float64)
    start = 0.0 if offset is None else offset.reshape(-1, 1)
    stored = dequantized(kind, raw[None]).reshape(-1, coding.group)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.clip((values.reshape(stored.shape) - start) / scale, coding.lowest, coding.highest)
        errors = np.abs(wanted - (stored - start) / scale)
    return float(np.where(scale == 0, 0, errors).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighed", [False, True])
def test_a_code_that_is_one_off_is_seen(kind: str, weighed: bool) -> None:
    values, importance = gaussian(64), uneven() if weighed else None
    raw = quantized(kind, values, importance)
    blocks = values.size // BLOCK_SIZES[kind][0]
    count = found(kind, flipped(raw, kind, CODES[kind], 0), values, importance).count
    # A code fits no scale any more, but with an importance some scale fits every code that counts for little.
    assert count >= (0.5 if weighed and kind in KNOWN[:4] else 0.95) * blocks
    assert count <= blocks


# Where a block has the scale of its first group, and in which share of 512 blocks, less a tenth, one that is one off is
# seen. Of those that are four off it is 97 % or more.
GROUP_SCALES = {
    "Q2_K": (0, 0.73), "Q3_K": (96, 0.43), "Q4_K": (4, 0.84), "Q5_K": (4, 0.9), "Q6_K": (192, 0.67),
    "IQ4_XS": (4, 0.82),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(GROUP_SCALES))
def test_a_scale_of_a_group_that_is_off_is_seen(kind: str) -> None:
    values, (byte, least) = gaussian(64), GROUP_SCALES[kind]
    raw = quantized(kind, values)
    assert found(kind, flipped(raw, kind, byte, 0), values).count >= least * 64
    assert found(kind, flipped(raw, kind, byte, 2), values).count >= 0.9 * 64


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_first_few_are_named_and_the_others_counted() -> None:
    values = gaussian(4)
    raw = quantized("Q8_0", values).copy()
    raw[1, 34 * 2 + 2] ^= 1 << 6
    result = found("Q8_0", raw, values, first=100)
    assert result == ImpossibleGroups(
        1, ("columns 64 to 95 of row 101: 1 of 32 codes is not the nearest under the stored scale",)
    )
    raw[2:, 0] ^= 1
    raw[3, 34] ^= 1
    result = found("Q8_0", raw, values, first=100)
    assert result.count == 4
    assert [place.split(":")[0] for place in result.named] == [
        "columns 64 to 95 of row 101", "columns 0 to 31 of row 102", "columns 0 to 31 of row 103",
    ]  # fmt: skip
    stored, wanted = (abs(float(raw[2, :2].view("<f2")[0])), float(np.abs(values[2, :32]).max() / 127))
    assert result.named[1].endswith(f"the scale is {stored:.5g} and should be {wanted:.5g}")
    more = ImpossibleGroups(2, ("a", "b")).plus(ImpossibleGroups(5, ("c", "d", "e")))
    assert more == ImpossibleGroups(7, ("a", "b", "c"))
    assert len(more.named) == NAMED_GROUPS


def test_a_minimum_that_is_off_is_called_one() -> None:
    values = gaussian(1, 32)
    raw = quantized("Q4_1", values).copy()
    raw[0, 2] ^= 1 << 3
    (reason,) = found("Q4_1", raw, values).named
    assert "the minimum is -0.0" in reason
    assert reason.endswith(f"should be {values.min():.5g}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_a_scale_that_is_not_finite_is_no_accident(kind: str) -> None:
    """Its values are NaN or infinite; what is found in it does not matter, as no limit lets that pass."""
    values = gaussian(4)
    raw = quantized(kind, values).copy()
    for bits in (b"\x00\x7c", b"\x00\xfe"):
        start = SCALES[kind][0]
        raw[2, start : start + 2] = np.frombuffer(bits, np.uint8)
        result = found(kind, raw, values)
        assert result.count == 0 or "row 2" in result.named[0]


def test_what_is_not_known_is_not_judged() -> None:
    """Types of codebooks; scales by an importance that is not at hand. Those of Q8_0 know no importance."""
    values, importance = gaussian(4), uneven()
    raw = quantized("IQ3_S", values, importance)
    assert found("IQ3_S", flipped_bytes(raw), values) == ImpossibleGroups()
    damaged = quantized("Q5_0", values, importance).copy()
    damaged[:, 0] ^= 8
    assert found("Q5_0", damaged, values, importance).count == 4
    assert found("Q5_0", damaged, values, weighed=True) == ImpossibleGroups()
    damaged = quantized("Q8_0", values).copy()
    damaged[:, 0] ^= 8
    assert found("Q8_0", damaged, values, weighed=True).count == 4


def flipped_bytes(raw: Bytes) -> Bytes:
    return raw ^ np.uint8(1)


def test_rows_may_have_importances_of_their_own() -> None:
    """Those of experts."""
    values, importance = gaussian(4), np.stack([uneven(), uneven()[::-1]]).repeat(2, axis=0)
    raw = np.concatenate([quantized("Q4_0", values[at : at + 2], importance[at].copy()) for at in (0, 2)])
    assert found("Q4_0", raw, values, importance) == ImpossibleGroups()
    assert found("Q4_0", raw, values, importance[0]).count > 0
