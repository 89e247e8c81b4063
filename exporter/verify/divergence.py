"""Kullback-Leibler divergence of an artifact from the reference, position by position, as its logits come."""

from __future__ import annotations

import numpy as np
import torch

from exporter.verify.reference import Reference


class Divergence:
    """Takes an artifact's logits window by window.

    Args:
        reference: the trained model; its logits are computed again for each window, a few positions at a time.

    Attributes:
        values: KL(reference ‖ artifact) = sum p (ln p - ln q) over the vocabulary, in nats, float64, shape
            (windows, scored); NaN where no logits came.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        windows = reference.windows
        self.values = np.full((len(windows.ids), windows.scored), np.nan)

    def take(self, window: int, logits: torch.Tensor) -> None:
        """Take the logits of a window's scored positions: float32, shape (scored, vocabulary).

        The artifact's vocabulary may be padded or cut differently; both are compared over what they share.
        """
        for rows, expected in self._reference.logits(window):
            found = logits[rows].to(expected.device)
            shared = min(found.shape[1], expected.shape[1])
            p = torch.log_softmax(expected[:, :shared], dim=1)
            q = torch.log_softmax(found[:, :shared], dim=1)
            self.values[window, rows] = q.neg_().add_(p).mul_(p.exp_()).sum(dim=1, dtype=torch.float64).cpu().numpy()
