"""Rough figures for the plan: memory and time. Measured with scripts/benchmark.py; docs/performance.md has the runs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from exporter.backends.base import OutputPlan
from exporter.checkpoint import DTYPE_BYTES
from exporter.model import MergedModel
from exporter.recipe import Recipe
from exporter.tour.sizes import BATCH_TOKENS, HEAD_ROWS, LOGIT_ROWS

# Interpreter, torch and this package, and the buffers for hashing.
_RESIDENT_BYTES = 250 << 20
# Interpreter, torch, transformers and peft.
_REFERENCE_RESIDENT_BYTES = 480 << 20
# Raw rows, float32 rows, product and stored rows of one block, and what the allocator keeps of them.
_BLOCK_FACTOR = 5

_STARTUP_SECONDS = 4.0
# Until vLLM answers, and until it has ended.
_SERVER_SECONDS = 45.0
# Elements a second and thread: reading, merging and writing floats; and ggml_quantize_chunk, by type.
_MERGE_RATE = 150e6
_QUANTIZE_RATE = {
    "Q8_0": 165e6, "Q4_0": 570e6, "Q4_1": 700e6, "Q5_0": 330e6, "Q5_1": 320e6, "Q6_K": 27e6, "Q5_K": 14e6,
    "Q4_K": 11e6, "Q3_K": 58e6, "Q2_K": 11e6, "IQ4_NL": 3.4e6, "IQ4_XS": 3.4e6,
}  # fmt: skip
# Multiply-adds a second and thread in a forward pass.
_FORWARD_RATE = 50e9


def merge_memory(model: MergedModel, threads: int, block_bytes: int) -> int:
    """Estimated peak memory of merging and writing: it does not depend on the size of the model or of its tensors."""
    factors = max((4 * u.rank * max(u.shape) for tensor in model.tensors for u in tensor.updates), default=0)
    return _RESIDENT_BYTES + (threads + 1) * _BLOCK_FACTOR * block_bytes + 2 * factors


def reference_memory(model: MergedModel, tokens: int, n_ctx: int) -> int:
    """Estimated peak memory of the reference: one layer with the activations of a pass, or the head with its logits."""
    hidden = int(model.config.get("hidden_size") or 0)
    inner = max(int(model.config.get("intermediate_size") or 0), 4 * hidden)
    adapters = sum(
        4 * update.rank * (update.a.shape[1] + update.b.shape[0])
        for adapter in model.adapters
        for update in adapter.updates.values()
    )
    walking = max(layer_bytes(model), default=0) + 4 * max(BATCH_TOKENS["cpu"], n_ctx) * (4 * hidden + 3 * inner)
    scoring = 4 * hidden * HEAD_ROWS
    if head := model.head:
        kept = 4 if head.updates else DTYPE_BYTES[head.source.dtype]
        scoring += kept * head.elements + 4 * 4 * head.shape[0] * LOGIT_ROWS
    return _REFERENCE_RESIDENT_BYTES + adapters + 4 * hidden * tokens + max(walking, scoring)


def layer_bytes(model: MergedModel) -> list[int]:
    """float32 bytes of each decoder layer."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        if found := re.match(r".*\.layers\.\d+\.", tensor.name):
            sizes[found[0]] = sizes.get(found[0], 0) + 4 * tensor.elements
    return list(sizes.values())


def seconds(
    model: MergedModel, artifacts: Sequence[OutputPlan], threads: int, recipe: Recipe, servers: int = 0
) -> float:
    """Rough duration of a run that starts so many vLLM servers."""
    work = model.parameters / _MERGE_RATE
    for artifact in artifacts:
        for tensor in artifact.tensors:
            work += tensor.rows * tensor.columns / _QUANTIZE_RATE.get(tensor.type, _MERGE_RATE)
    duration = _STARTUP_SECONDS + work / threads
    if recipe.verify:
        passes = 1 + len(artifacts)
        duration += _STARTUP_SECONDS + passes * recipe.evaluation.tokens * model.parameters / (_FORWARD_RATE * threads)
    return duration + servers * _SERVER_SECONDS
