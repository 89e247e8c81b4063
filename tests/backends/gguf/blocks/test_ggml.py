"""ggml's quantizer with an importance, and what must never reach it: it ends the process where it cannot go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS, quantize_rows
from exporter.backends.gguf.file_types import BLOCK_SIZES, FLOAT_TYPES, row_bytes
from exporter.errors import BackendError

Floats = npt.NDArray[np.float32]


def _each(kinds: Iterable[str]) -> list[Any]:
    """Parameters; those whose tables take long are left to CI."""
    return [pytest.param(kind, marks=pytest.mark.slow) if kind in _SLOW else kind for kind in kinds]


KINDS = tuple(kind for kind in BLOCK_SIZES if kind not in FLOAT_TYPES)
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# Their tables take ggml seconds to make: IQ1_S and IQ1_M share 13 s of them.
_SLOW = ("IQ1_S", "IQ1_M", "IQ2_S")
# ggml_quantize_requires_imatrix
ABORTING = ("IQ1_S", "IQ2_XXS", "IQ2_XS")


def _quantized(kind: str, values: Floats, importance: Floats | None) -> bytes:
    rows, columns = values.shape
    return bytes(quantize_rows(kind, values.ctypes.data, rows, columns, rows * row_bytes(kind, columns), importance))


def _values(rows: int = 4) -> Floats:
    return np.random.default_rng(0).normal(size=(rows, 256)).astype(np.float32)


def _dequantized(kind: str, stored: bytes, rows: int) -> Floats:
    data = np.frombuffer(stored, np.uint8).reshape(rows, -1)
    found: Floats = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return found


@pytest.mark.parametrize("kind", _each(KINDS))
def test_an_importance_lowers_the_error_where_it_is_high(kind: str) -> None:
    values, importance = _values(16), np.full(256, 1e-3, np.float32)
    important = np.random.default_rng(1).permutation(256)[:64]
    importance[important] = 1
    weighed = _dequantized(kind, _quantized(kind, values, importance), 16)
    evenly = _dequantized(kind, _quantized(kind, values, np.ones(256, np.float32)), 16)
    errors = [float(((found - values)[:, important] ** 2).sum()) for found in (weighed, evenly)]
    if kind == "Q8_0":
        # The one quantizer that weighs nothing (quantize_q8_0).
        assert errors[0] == errors[1]
    else:
        assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("kind", _each(KINDS))
def test_an_importance_of_zeros_gives_finite_values(kind: str) -> None:
    """Columns that calibration never reached: llama.cpp takes them as they are."""
    importance = np.ones(256, np.float32)
    importance[32:128] = 0
    values = _values()
    values[1] = 0
    values[2] *= 1e-30
    for weights in (importance, np.zeros(256, np.float32)):
        assert np.isfinite(_dequantized(kind, _quantized(kind, values, weights), 4)).all()


@pytest.mark.parametrize("kind", _each(KINDS))
def test_a_type_without_importance_is_quantized_or_refused(kind: str) -> None:
    if kind in ABORTING:
        with pytest.raises(BackendError, match="no importance"):
            _quantized(kind, _values(), None)
    else:
        assert len(_quantized(kind, _values(), None)) == 4 * row_bytes(kind, 256)


@pytest.mark.parametrize("shape", [(255,), (257,), (512,), (1, 256), (0,)])
def test_an_importance_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match="importance for Q4_K"):
        _quantized("Q4_K", _values(), np.ones(shape, np.float32))


def test_an_importance_need_not_be_contiguous_float32() -> None:
    weights: Any = np.random.default_rng(2).random(512)[::2]
    straight = np.ascontiguousarray(weights, np.float32)
    assert _quantized("Q4_K", _values(), weights) == _quantized("Q4_K", _values(), straight)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("case", ["value", "negative value", "nan value", "importance", "nan importance", "both"])
def test_what_would_end_the_process_is_refused(kind: str, case: str) -> None:
    values, importance = _values(), np.ones(256, np.float32)
    if "value" in case:
        values[2, 7] = {"value": 3e38, "negative value": -1e19, "nan value": np.nan}[case]
    elif case == "both":
        values[2, 7], importance[:] = 1e12, 1e12
    else:
        importance[5] = np.nan if "nan" in case else 3e38
    with pytest.raises(BackendError, match="not finite"):
        _quantized(kind, values, importance)


@pytest.mark.parametrize("kind", _each(GRIDS))
def test_large_values_that_it_can_take_are_taken(kind: str) -> None:
    """An importance of 1e6 and weights of thousands are beyond any model, and no reason to refuse."""
    values = 1000 * _values()
    importance = np.full(256, 1e6, np.float32)
    found = _dequantized(kind, _quantized(kind, values, importance), 4)
    assert np.abs(found - values).max() < np.abs(values).max()


THREADS = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from exporter.backends.gguf.blocks.ggml import quantize_rows
from exporter.backends.gguf.file_types import row_bytes
kinds, threads = sys.argv[1].split(), int(sys.argv[2])
rng = np.random.default_rng(0)
values, importance = rng.normal(size=(4, 256)).astype(np.float32), rng.random(256).astype(np.float32)
def one(kind):
    return bytes(quantize_rows(kind, values.ctypes.data, 4, 256, 4 * row_bytes(kind, 256), importance))
with ThreadPoolExecutor(threads) as pool:
    print(hashlib.sha256(b"".join(pool.map(one, kinds * 4))).hexdigest())
"""


def test_tables_are_made_once_by_several_threads_at_once() -> None:
    """In processes of their own, where no table exists yet."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", THREADS, "IQ2_XXS IQ3_XXS IQ3_S", str(threads)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 8)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0].strip()) == 64


def test_every_type_has_a_number() -> None:
    assert TYPE_NUMBERS.keys() == BLOCK_SIZES.keys()
