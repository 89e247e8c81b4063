"""Where a reference pack keeps the sketches of the weights; see `exporter.verify.sketches`.

sketches.safetensors   merged NAME, and delta NAME where an adapter changes it: float32 (rows, runs)
                       base_values int32 (tensors, 2): see `exporter.verify.sums`, zeros where there is no delta
"""

from __future__ import annotations

from collections.abc import Collection

from exporter.model import MergedModel
from exporter.verify.pack_tensor import PackTensor
from exporter.verify.sketches import runs_of

SKETCHES_FILE = "sketches.safetensors"
MERGED, DELTA, BASE_VALUES = "merged ", "delta ", "base_values"


def sketch_tensors(model: MergedModel, updated: Collection[str]) -> dict[str, PackTensor]:
    """The tensors of sketches by name, in model order.

    Args:
        model: the merged model.
        updated: the merged tensors that an adapter changes.
    """
    found: dict[str, PackTensor] = {}
    for tensor in model.tensors:
        one = PackTensor(SKETCHES_FILE, "F32", (tensor.source.rows, runs_of(tensor.source.columns)))
        found[f"{MERGED}{tensor.name}"] = one
        if tensor.name in updated:
            found[f"{DELTA}{tensor.name}"] = one
    return found | {BASE_VALUES: PackTensor(SKETCHES_FILE, "I32", (len(model.tensors), 2))}
