"""What only an adapter's values show: that it was trained, and that its copies of the base's tensors are the base's."""

from __future__ import annotations

import math

from exporter.adapters.adapter import Adapter
from exporter.adapters.base import unsupported
from exporter.errors import NonFiniteTensorError, ZeroDeltaError
from exporter.families.roles import EMBEDDING, HEAD, weight_of
from exporter.inputs.checkpoint import Checkpoint, StoredTensor
from exporter.inputs.floats import as_float32
from exporter.inputs.tensor_reader import TensorReader


def check_values(adapter: Adapter) -> None:
    """Read every tensor of the updates once and refuse NaN, infinity, and updates that change nothing.

    Raises:
        NonFiniteTensorError: a tensor holds NaN or infinity.
        ZeroDeltaError: the merge would leave a target as it was: of LoRA, A, B or the scale is zero.
    """
    with TensorReader() as reader:
        for update in adapter.updates.values():
            peaks = {tensor.name: _peak(reader, tensor) for tensor in update.tensors}
            if (what := update.without_effect(peaks)) is not None:
                raise ZeroDeltaError(
                    what,
                    found="zeros only, so the merge would leave this target as it was",
                    expected="a trained update",
                    remedy="Check that the adapter was saved after training.",
                )


def _peak(reader: TensorReader, tensor: StoredTensor) -> float:
    """Largest magnitude in a tensor; raises `NonFiniteTensorError` on NaN or infinity."""
    values = as_float32(reader.rows(tensor, 0, tensor.rows), tensor.dtype)
    peak = float(max(-values.min(), values.max())) if values.size else 0.0
    if not math.isfinite(peak):
        raise NonFiniteTensorError(
            tensor.name,
            found="NaN or infinity",
            expected="finite numbers",
            remedy="Training diverged or the file is damaged.",
        )
    return peak


def check_copies(adapter: Adapter, base: Checkpoint) -> None:
    """Whole weights saved beside the updates must be the base's own, or they are trained and not supported yet.

    peft saves the embedding layers along when they are targeted (`save_embedding_layers="auto"`); then they are copies.

    Raises:
        UnsupportedAdapterError: a copy differs from the base in shape or in any value.
    """
    embedding = base.tensors.get(EMBEDDING)
    for module, copy in adapter.copies.items():
        original = base.tensors.get(weight_of(module))
        if original is None and weight_of(module) == HEAD and base.config.get("tie_word_embeddings"):
            original = embedding
        if original is None or original.shape != copy.shape or not equal_values(copy, original):
            found = "no such base tensor" if original is None else f"{list(copy.shape)} with values of its own"
            raise unsupported(copy.name, found, "a copy of the base's tensor: trained or resized embeddings are not")


def equal_values(one: StoredTensor, other: StoredTensor, block_bytes: int = 1 << 22) -> bool:
    """Whether two float tensors of one shape hold the same values. Reads both, block by block."""
    rows = max(1, block_bytes // max(one.row_bytes, other.row_bytes))
    with TensorReader() as reader:
        for first in range(0, one.rows, rows):
            count = min(rows, one.rows - first)
            mine = as_float32(reader.rows(one, first, count), one.dtype)
            if not (mine == as_float32(reader.rows(other, first, count), other.dtype)).all():
                return False
    return True
