"""Importance matrices of small models, as random as those of real ones are uneven."""

from __future__ import annotations

import numpy as np

from exporter.backends.gguf.imatrix.file import Importance

# The matrices of a dense layer.
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def random_importances(layers: int = 2, hidden: int = 256, intermediate: int = 512) -> dict[str, Importance]:
    """Entries for every matrix of the layers of a dense model, by llama.cpp's names."""
    rng = np.random.default_rng(0)
    return {
        name: Importance(
            (100 * rng.exponential(size=(1, intermediate if "down" in name else hidden)) ** 3).astype(np.float32),
            np.array([2048], np.float32),
        )
        for name in (f"blk.{layer}.{kind}.weight" for layer in range(layers) for kind in MATRICES)
    }
