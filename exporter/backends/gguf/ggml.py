"""ggml's own quantizer, called by ctypes from the library inside llama-cpp-python.

It is the code that llama-quantize runs, so the bytes are the same; ctypes releases the GIL, so threads run it at once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from exporter.errors import BackendError

# ggml_type (ggml/include/ggml.h)
TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30,
}  # fmt: skip


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
    loaded.ggml_validate_row_data.restype = ctypes.c_bool
    loaded.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return loaded


def quantize_rows(kind: str, source: int, rows: int, columns: int, nbytes: int) -> bytearray:
    """Quantize a block of rows.

    Args:
        kind: the type, for example `Q4_K`.
        source: address of `rows * columns` contiguous float32 values; the caller keeps them alive.
        rows: number of rows.
        columns: elements in a row, a multiple of the type's block.
        nbytes: bytes of all rows in that type.

    Returns:
        The quantized rows.

    Raises:
        BackendError: ggml wrote another number of bytes, or a block holds a scale that is not finite.
    """
    ggml, number, target = library(), TYPE_NUMBERS[kind], bytearray(nbytes)
    address = ctypes.addressof((ctypes.c_char * nbytes).from_buffer(target))
    written = ggml.ggml_quantize_chunk(number, source, address, 0, rows, columns, None)
    if written != nbytes or not ggml.ggml_validate_row_data(number, address, nbytes):
        raise BackendError(
            f"ggml_quantize_chunk to {kind}",
            found=f"{written} bytes" if written != nbytes else "a block with a scale that is not finite",
            expected=f"{nbytes} bytes of valid blocks",
            remedy="Check the base for extreme values, or choose a wider type.",
        )
    return target
