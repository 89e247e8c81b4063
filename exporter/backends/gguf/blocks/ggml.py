"""ggml's own quantizer, called by ctypes from the library inside llama-cpp-python.

It is the code that llama-quantize runs, so the bytes are the same; ctypes releases the GIL, so threads run it at once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.errors import BackendError

# ggml_type (ggml/include/ggml.h)
TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30,
}  # fmt: skip

# Types whose quantizer ends the process (GGML_ABORT) instead of failing: without an importance
# (ggml_quantize_requires_imatrix), and where its sums overflow, which points at no place of its grid.
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
_GRIDS = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
# Largest importance · weight² that those take: far above any model; overflows were seen from 1e32 on.
_LARGEST_SQUARE = 1e30


@cache
def library() -> ctypes.CDLL:
    """The library `ggml-base`, with its functions declared.

    Raises:
        BackendError: llama-cpp-python is not installed, or has no such library.
    """
    spec = find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    path = next((folder / name for name in names if folder and (folder / name).is_file()), None)
    if path is None:
        raise BackendError(
            "llama-cpp-python",
            found="no ggml-base library" if folder else "no such package",
            expected="the package with its libraries",
            remedy="Install llama-cpp-python (make setup).",
        )
    loaded = ctypes.CDLL(str(path))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    loaded.ggml_quantize_init.restype = None
    loaded.ggml_quantize_init.argtypes = [ctypes.c_int]
    loaded.ggml_validate_row_data.restype = ctypes.c_bool
    loaded.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return loaded


@cache
def _prepare(number: int) -> None:
    """Fill the tables of a type's grid: once, under ggml's own lock, and never freed."""
    library().ggml_quantize_init(number)


def quantize_rows(
    kind: str, source: int, rows: int, columns: int, nbytes: int, importance: npt.NDArray[np.float32] | None = None
) -> bytearray:
    """Quantize a block of rows. May be called from several threads at once.

    Args:
        kind: the type, for example `Q4_K`.
        source: address of `rows * columns` contiguous float32 values; the caller keeps them alive.
        rows: number of rows.
        columns: elements in a row, a multiple of the type's block.
        nbytes: bytes of all rows in that type.
        importance: float32 [columns], how much an error counts in each column, the same for all rows; without it,
            ggml weighs by the values themselves.

    Returns:
        The quantized rows.

    Raises:
        BackendError: ggml wrote another number of bytes, or a block holds a scale that is not finite; the importance
            is of another length, or missing for a type that cannot do without; values or importance are too large.
    """
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if weights is not None and weights.shape != (columns,):
        raise BackendError(
            f"importance for {kind}",
            found=f"shape {list(weights.shape)}",
            expected=f"[{columns}]",
            remedy="This is a defect of the backend.",
        )
    if weights is None and kind in _NEED_IMPORTANCE:
        raise BackendError(
            f"ggml_quantize_chunk to {kind}",
            found="no importance",
            expected=f"one for each of the {columns} columns",
            remedy="Give an importance matrix (--imatrix).",
        )
    if kind in _GRIDS:
        _check_range(kind, source, rows * columns, weights)
    ggml, number, target = library(), TYPE_NUMBERS[kind], bytearray(nbytes)
    _prepare(number)
    address = ctypes.addressof((ctypes.c_char * nbytes).from_buffer(target))
    given = None if weights is None else weights.ctypes.data
    written = ggml.ggml_quantize_chunk(number, source, address, 0, rows, columns, given)
    if written != nbytes or not ggml.ggml_validate_row_data(number, address, nbytes):
        raise BackendError(
            f"ggml_quantize_chunk to {kind}",
            found=f"{written} bytes" if written != nbytes else "a block with a scale that is not finite",
            expected=f"{nbytes} bytes of valid blocks",
            remedy="Check the base for extreme values, or choose a wider type.",
        )
    return target


def _check_range(kind: str, source: int, elements: int, importance: npt.NDArray[np.float32] | None) -> None:
    """Refuse what would end the process."""
    values = np.ctypeslib.as_array((ctypes.c_float * elements).from_address(source))
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    heaviest = 1.0 if importance is None else float(importance.max())
    # Written so that NaN is refused too.
    if not max(heaviest, 1.0) * largest * largest <= _LARGEST_SQUARE:
        raise BackendError(
            f"ggml_quantize_chunk to {kind}",
            found=f"values up to {largest:.3g} with an importance up to {heaviest:.3g}, and scales that are not finite",
            expected=f"importance · value² up to {_LARGEST_SQUARE:g}",
            remedy="Check the base for extreme values, or choose a wider type.",
        )
