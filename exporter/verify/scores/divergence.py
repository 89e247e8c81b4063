"""Divergences of an artifact from the reference, position by position.

In the full form they are taken from all logits as these come. From a runtime that gives only the likeliest tokens there
is the top-k form, which is another figure and never stands in for the full one.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from exporter.reference.predictions import Reference
from exporter.runtimes.base import TokenScores, TopK, TopKScores, block_rows
from exporter.verify.scores.metrics import Divergences

# What is added to the artifact's bucket of all other tokens: it is 1 minus a sum over log-probabilities in float32, and
# may be off by that much. A bucket that is too small would make the top-k form exceed the divergence that it bounds.
REST_ERROR = 1e-6


class Divergence:
    """Takes an artifact's logits window by window.

    Args:
        reference: the trained model; its logits are computed again for each window, a few positions at a time.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        shape = (len(reference.windows.ids), reference.windows.scored)
        self._kl, self._jensen_shannon = np.zeros(shape), np.zeros(shape)
        self._taken: set[int] = set()

    def take(self, window: int, logits: torch.Tensor) -> None:
        """Take the logits of a window's scored positions: float32, shape (scored, vocabulary).

        The artifact's vocabulary may be padded or cut differently; both are compared over what they share.
        """
        self._taken.add(window)
        for rows, expected in self._reference.logits(window):
            found = logits[rows].to(expected.device)
            shared = min(found.shape[1], expected.shape[1])
            size = block_rows(expected)
            blocks = zip(*(torch.split(side[:, :shared], size) for side in (expected, found)), strict=True)
            kl, jensen_shannon = zip(*(divergences(*block) for block in blocks), strict=True)
            self._kl[window, rows] = torch.cat(kl).cpu().numpy()
            self._jensen_shannon[window, rows] = torch.cat(jensen_shannon).cpu().numpy()

    def found(self, scores: TokenScores) -> Divergences:
        """What is known once the artifact is scored: the full form if its logits came, else the top-k form if it can
        be computed, else nothing.

        Args:
            scores: the artifact's.

        Raises:
            ValueError: the logits of some windows came, and not of others.
        """
        if len(self._taken) == len(self._kl):
            return Divergences(self._kl, self._jensen_shannon)
        if self._taken:
            raise ValueError(f"logits of {len(self._taken)} of {len(self._kl)} windows")
        if isinstance(scores, TopKScores):
            return Divergences(top_k=top_k_divergences(self._reference, scores.top), k=scores.top.ids.shape[2])
        return Divergences()


def divergences(expected: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and Jensen-Shannon divergence of two sets of predictions.

    With d = ln p - ln q and m = (p + q) / 2:
    KL(p ‖ q) = sum p d, taken as sum (p d - p + q), whose terms are not negative: sum p d alone cancels, and shows the
    rounding of the two log-softmaxes as a divergence of 1e-6.
    JS(p, q) = (KL(p ‖ m) + KL(q ‖ m)) / 2 (Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions
    on Information Theory 37, 1991, with weights of a half), where ln(p / m) = ln 2 + ln sigmoid(d), and
    ln(q / m) = ln(p / m) - d.

    Args:
        expected: the reference's logits, float32, shape (positions, vocabulary).
        found: the artifact's, same shape.

    Returns:
        KL(reference ‖ artifact) in nats and the Jensen-Shannon divergence in bits, float64, shape (positions,). Not
        finite where a logit is not.
    """
    p, q = torch.log_softmax(expected, dim=1), torch.log_softmax(found, dim=1)
    d = p - q
    p.exp_()
    q.exp_()
    to_middle = torch.nn.functional.logsigmoid(d).add_(math.log(2)).mul_(p + q).addcmul_(q, d, value=-1)
    kl = d.mul_(p).add_(q).sub_(p)
    # Neither is negative, and rounding must not make it so.
    return kl.sum(dim=1).clamp(min=0).double(), (to_middle.sum(dim=1) / (2 * math.log(2))).clamp(0, 1).double()


def top_k_divergences(reference: Reference, top: TopK) -> npt.NDArray[np.float64]:
    """KL(reference ‖ artifact) over the artifact's k likeliest tokens and one bucket for all others.

    By the data-processing inequality (Cover and Thomas, "Elements of Information Theory", chapter 2) this is at most
    the full divergence, and equal to it where the k tokens are the whole vocabulary. A token that the artifact gives no
    probability, or that the reference does not have, counts in the bucket.

    Args:
        reference: the trained model.
        top: the artifact's likeliest tokens.

    Returns:
        In nats, float64, shape (windows, scored); NaN where a log-probability is.
    """
    found = np.empty(top.ids.shape[:2])
    for window in range(len(found)):
        for rows, logits in reference.logits(window):
            ids = torch.from_numpy(top.ids[window, rows]).to(logits.device)
            # From the largest logit: a float32 logsumexp of large logits is off by their last bit, which would count.
            largest = logits.amax(dim=1, keepdim=True)
            total = (logits - largest).exp_().sum(dim=1, keepdim=True, dtype=torch.float64)
            theirs = logits.gather(1, ids.clamp(max=logits.shape[1] - 1)).double() - largest.double() - total.log()
            ours = top.log_probabilities[window, rows]
            alone = (ids < logits.shape[1]).cpu().numpy() & (ours != -np.inf)
            found[window, rows] = _coarse(theirs.cpu().numpy(), ours, alone)
    return found


def _coarse(
    theirs: npt.NDArray[np.float64], ours: npt.NDArray[np.float64], alone: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The divergence of each row, where `alone` says which tokens are not in the bucket; all of shape (rows, k)."""
    p, q = (np.where(alone, np.exp(values), 0.0) for values in (theirs, ours))
    rest_p, rest_q = (1 - values.sum(axis=1) for values in (p, q))
    rest_p, rest_q = rest_p.clip(min=0), rest_q.clip(min=0) + REST_ERROR
    # The smallest float in place of no probability: 0 ln 0 is 0.
    rest = rest_p * (np.log(rest_p.clip(min=np.finfo(np.float64).tiny)) - np.log(rest_q))
    # Nor is this, but for REST_ERROR.
    total: npt.NDArray[np.float64] = (p * np.where(alone, theirs - ours, 0.0)).sum(axis=1) + rest
    return total.clip(min=0)
