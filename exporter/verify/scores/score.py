"""The predictions of one artifact in its runtime, beside the trained model's on the same windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.errors import RuntimeScoreError
from exporter.plan.reporter import Reporter
from exporter.runtimes.base import Runtime, TokenScores
from exporter.verify.scores.metrics import Comparison, Divergences, compare

if TYPE_CHECKING:
    from exporter.reference.predictions import Reference


@dataclass(frozen=True)
class Scored:
    """What is known of an artifact's predictions so far.

    Attributes:
        scores: the artifact's.
        reference: the trained model's on the same windows.
        divergences: by position.
    """

    scores: TokenScores
    reference: TokenScores
    divergences: Divergences

    def plus(self, other: Scored) -> Scored:
        """Both, one after the other."""
        return Scored(
            _joined(self.scores, other.scores),
            _joined(self.reference, other.reference),
            self.divergences.plus(other.divergences),
        )

    def compare(self) -> Comparison:
        """Both over all windows."""
        return compare(self.scores, self.reference, self.divergences)


def _joined(left: TokenScores, right: TokenScores) -> TokenScores:
    return TokenScores(
        np.concatenate([left.log_probabilities, right.log_probabilities]),
        np.concatenate([left.top_tokens, right.top_tokens]),
    )


def score_in(runtime: Runtime, entry: Path, label: str, reference: Reference, reporter: Reporter) -> Scored:
    """Score one artifact in one runtime.

    Args:
        runtime: what serves it.
        entry: what the runtime loads.
        label: the artifact's name, for messages.
        reference: the trained model.
        reporter: told about every window.

    Raises:
        RuntimeScoreError: the runtime cannot load or run it, or its scores are not numbers.
    """
    # Not at the top: torch, which this needs, is imported while the first shard is hashed.
    from exporter.verify.scores.divergence import Divergence

    divergence = Divergence(reference)
    reporter.scoring(f"{label} in {runtime.name}", reference.windows)
    scores = runtime.score(entry, reference.windows, reporter.window, divergence.take)
    found = divergence.found(scores)
    arrays = (scores.log_probabilities, found.kl, found.jensen_shannon, found.top_k)
    if not all(np.isfinite(values).all() for values in arrays if values is not None):
        raise RuntimeScoreError(
            f"{label} in {runtime.name}", found="log-probabilities that are not finite",
            expected="numbers", remedy="Choose a type with a wider range, such as bf16.",
        )  # fmt: skip
    return Scored(scores, reference.scores, found)
