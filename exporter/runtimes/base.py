"""What a runtime gives: log-probabilities of the right tokens, and the tokens it would have chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from exporter.calibration import Windows
from exporter.errors import RecipeError, RuntimeScoreError

OnWindow = Callable[[int], None]


@dataclass(frozen=True)
class TokenScores:
    """Scores of the scored positions of all windows.

    Attributes:
        log_probabilities: natural log-probability of the right token, float64, shape (windows, scored).
        top_tokens: id of the likeliest token, int64, shape (windows, scored).
    """

    log_probabilities: npt.NDArray[np.float64]
    top_tokens: npt.NDArray[np.int64]


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of every scored position, likeliest first.

    Attributes:
        ids: token ids, int64, shape (windows, scored, k).
        log_probabilities: their natural log-probabilities, float64, same shape.
    """

    ids: npt.NDArray[np.int64]
    log_probabilities: npt.NDArray[np.float64]


@dataclass(frozen=True)
class TopKScores(TokenScores):
    """Token scores with the head of each distribution, as much as a server gives.

    Attributes:
        top: the k likeliest tokens; `top_tokens` is its first column.
    """

    top: TopK


class Runtime(Protocol):
    """Loads an artifact as its server would and scores windows with it."""

    name: str

    def score(self, artifact: Path, windows: Windows, on_window: OnWindow) -> TokenScores:
        """Score an artifact.

        Args:
            artifact: a file or a model folder.
            windows: what to score.
            on_window: called with 1 after each window.

        Raises:
            RuntimeScoreError: the runtime cannot load or run it.
        """

    def version(self) -> str:
        """Name and version, for the manifest."""


def score_logits(logits: Any, targets: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Log-probabilities of the targets and the likeliest tokens.

    Args:
        logits: float32 torch tensor, shape (positions, vocabulary).
        targets: int64 torch tensor, shape (positions,).

    Returns:
        Both of shape (positions,).
    """
    import torch

    right = logits.gather(1, targets[:, None])[:, 0].double()
    return (right - torch.logsumexp(logits, dim=1).double()).cpu().numpy(), logits.argmax(dim=1).cpu().numpy()


def check_vocabulary(artifact: Path, windows: Windows, size: int) -> None:
    """Every token of the windows must be in a vocabulary of `size` tokens.

    Raises:
        RuntimeScoreError: one is not.
    """
    if (largest := max(map(max, windows.ids))) >= size:
        raise RuntimeScoreError(
            artifact.name,
            found=f"{size} tokens",
            expected=f"at least {largest + 1}",
            remedy="The vocabulary was cut.",
        )


def load_runtime(name: str, device: str = "cpu") -> Runtime:
    """A runtime by name; `device` is where it computes, if it has a choice.

    Raises:
        RecipeError: there is none of that name.
    """
    if name == "llamacpp":
        from exporter.runtimes.llamacpp import LlamaCpp

        return LlamaCpp()
    if name == "transformers":
        from exporter.runtimes.transformers import Transformers

        return Transformers(device)
    if name == "vllm":
        from exporter.runtimes.vllm import Vllm

        return Vllm()
    raise RecipeError(
        f"runtime {name!r}", found="unknown", expected="llamacpp, transformers or vllm", remedy="Choose one."
    )
