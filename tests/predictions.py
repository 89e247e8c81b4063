"""References and top-k scores made of given logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from exporter.reference.predictions import HeldHead, Reference
from exporter.runtimes.base import TopK
from exporter.tokens.windows import Windows


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def reference_of(logits: npt.NDArray[np.float32], windows: Windows | None = None) -> Reference:
    """A reference with these logits, shape (windows, scored, vocabulary): its head is the identity."""
    count, scored, vocabulary = logits.shape
    if windows is None:
        windows = Windows(((0,) * (2 * scored + 1),) * count, 2 * scored + 1, "made", "0" * 64)
    assert windows.scored == scored
    return Reference(windows, torch.from_numpy(logits).__getitem__, HeldHead(torch.eye(vocabulary)))


def top_of(logits: npt.NDArray[np.float32], k: int) -> TopK:
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    # In float32, as a server gives them.
    given = log_softmax(logits).astype(np.float32).astype(np.float64)
    return TopK(ids.astype(np.int64), np.take_along_axis(given, ids, axis=-1))
