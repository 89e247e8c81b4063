"""Makes the encoder of one GGUF tensor: float32 rows to the bytes of its type."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import TYPE_CHECKING

from exporter.backends.gguf.blocks.ggml import quantize_rows
from exporter.backends.gguf.file_types import FLOAT_TYPES
from exporter.backends.gguf.imatrix.file import Floats
from exporter.backends.output_plan import TensorPlan
from exporter.errors import BackendError

if TYPE_CHECKING:
    import torch


Encoder = Callable[[TensorPlan, int, "torch.Tensor"], bytes | bytearray | memoryview]


def make_encoder(importance: Mapping[str, Floats], planned: Collection[str] = ()) -> Encoder:
    """The encoder of a GGUF file: tensor, number of the block's first row and block to stored bytes.

    Args:
        importance: by GGUF tensor name, float32 [columns] (experts one after the other); tensors that are not in it
            are quantized without. Looked up when rows are written, so the mapping may still be filling.
        planned: tensors that may not be missing from it.
    """

    def encode(tensor: TensorPlan, first_row: int, block: torch.Tensor) -> bytes | bytearray | memoryview:
        from exporter.backends.writing.offset_writer import encode_float

        if tensor.type in FLOAT_TYPES:
            return encode_float(block, tensor.type, tensor.name)
        weights = importance.get(tensor.name)
        if weights is None and tensor.name in planned:
            raise _protocol(tensor.name, "no importance", "the one that was planned")
        rows = block.cpu().contiguous()
        if weights is None:
            return _quantize(tensor, rows, None)
        groups = prod(tensor.shape[:-2])
        if weights.size != groups * tensor.columns:
            raise _protocol(tensor.name, f"{weights.size} importances", f"{groups * tensor.columns}")
        if groups == 1:
            return _quantize(tensor, rows, weights)
        return _quantize_experts(tensor, rows, weights.reshape(groups, tensor.columns), first_row)

    return encode


def _quantize(tensor: TensorPlan, rows: torch.Tensor, weights: Floats | None) -> bytearray:
    count, columns = rows.shape
    return quantize_rows(tensor.type, rows.data_ptr(), count, columns, count * tensor.row_bytes, weights)


def _quantize_experts(tensor: TensorPlan, rows: torch.Tensor, weights: Floats, first_row: int) -> bytearray:
    """Rows of one expert after the other, each with that expert's importance."""
    each, end, stored = tensor.shape[-2], first_row + len(rows), bytearray()
    row = first_row
    while row < end:
        expert = row // each
        until = min(end, (expert + 1) * each)
        stored += _quantize(tensor, rows[row - first_row : until - first_row], weights[expert])
        row = until
    return stored


def _protocol(name: str, found: str, expected: str) -> BackendError:
    return BackendError(name, found=found, expected=expected, remedy="This is a defect of the backend.")
