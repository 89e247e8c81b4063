"""Sizes that bound the memory of a tour. Apart from the code that uses them, since the plan must not wait for torch."""

from __future__ import annotations

# Tokens of one pass through a layer: enough to keep the processor busy, few enough to bound its activations.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
# Rows of the head that are turned into float32 at a time.
HEAD_ROWS = 8192
# Hidden states up to this size stay in memory.
KEEP_BYTES = 4 << 30
# Predictions whose logits exist at a time: those of a window of 512. For each such part the head is turned into float32
# once more, which takes as long as its product with 100 of them.
LOGIT_ROWS = 256
