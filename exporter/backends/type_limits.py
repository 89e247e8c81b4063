"""How far an artifact of one quantization type may be from the trained model, as its backend says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TypeLimits:
    """The default limits of one type; docs/measurements has the measurements that they rest on.

    Attributes:
        change: largest relative change of perplexity, up or down, of a model below 1 B parameters.
        same_top: smallest share of predictions with the reference's likeliest token.
        divergence: largest mean KL divergence from the reference in nats, over the whole vocabulary, below 1 B.
        published: change and divergence from 1 B on, where published figures allow stricter limits; None if the limits
            are those below 1 B.
        top_k: whether a runtime of the format gives only the likeliest tokens, so that the top-k form of the
            divergence has a limit too. False where every runtime gives whole predictions.
    """

    change: float
    same_top: float
    divergence: float
    published: tuple[float, float] | None = None
    top_k: bool = True
