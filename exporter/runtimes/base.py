"""What a runtime gives: log-probabilities of the right tokens, and the tokens it would have chosen."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from exporter.errors import RecipeError, RuntimeScoreError
from exporter.runtimes.artifact_facts import ArtifactFacts, PackedWeights
from exporter.tokens.windows import Windows

OnWindow = Callable[[int], None]
# Takes a window's number and the logits of its scored positions: a float32 torch tensor, shape (scored, vocabulary),
# which is valid until it returns.
OnLogits = Callable[[int, Any], None]
# Logits of one model that a thread works on at a time: they and what is computed from them stay in its cache, which
# makes the sums of a large vocabulary several times as fast.
BLOCK_BYTES = 1 << 20


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


@dataclass(frozen=True)
class Continuation:
    """What a runtime goes on with after a prompt, taking the likeliest token each time.

    Attributes:
        tokens: ids, with the token that ended it if one did.
        stopped: whether a token ended it; otherwise there were as many as were asked for.
    """

    tokens: tuple[int, ...]
    stopped: bool


class Session(Protocol):
    """An artifact, loaded once, as its server has it.

    Attributes:
        stop_evidence: how `stops_on` knows: `generation` (the token was forced, and nothing came after it) or
            `vocabulary` (the server ends an answer on the tokens that its vocabulary calls ends, and this is one).
    """

    stop_evidence: Literal["generation", "vocabulary"]

    def tokenize(self, text: str, *, special: bool) -> list[int] | None:
        """Token ids of a text, none added.

        Args:
            text: any text.
            special: whether a special token's text stands for the token; else it is plain text.

        Returns:
            None if the runtime has no such way to tokenize.
        """

    def render(self, conversation: Mapping[str, Any]) -> str:
        """A conversation as the artifact's chat template has it, up to where the answer begins.

        Args:
            conversation: `messages`, perhaps `tools`, and whatever else the template takes.

        Raises:
            RuntimeScoreError: the artifact has no chat template, or it refuses the conversation.
        """

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """Greedy continuations, of so many tokens at most.

        Raises:
            RuntimeScoreError: the runtime cannot run the artifact.
        """

    def stops_on(self, token: int) -> bool:
        """Whether an answer ends with this token."""

    def stop_ids(self) -> frozenset[int] | None:
        """All tokens that answers end with, if the runtime tells."""


class Runtime(ABC):
    """Loads an artifact as its server would, and scores windows with it.

    A runtime is a subclass that is registered in the entry-point group `exporter.runtimes` under its name. Its module
    must import quickly, as a plan asks the class whether it serves an artifact: methods import torch and the like.

    Attributes:
        name: what `--runtime` calls it.
        title: what errors call it; empty if that is its name.
        takes_endpoint: whether it scores with a running server, whose address is given.
        startup_seconds: rough time until a server that it starts answers, and until that server has ended.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    takes_endpoint: ClassVar[bool] = False
    startup_seconds: ClassVar[float] = 0.0

    @classmethod
    def open(cls, device: str, endpoint: str | None) -> Runtime:
        """Make one for a run. Nothing is loaded yet.

        Args:
            device: where it computes, if it has a choice.
            endpoint: address of a running server, for a runtime that takes one; None starts one.

        Raises:
            RecipeError: the endpoint is not an address.
        """
        del device, endpoint
        return cls()

    @classmethod
    def serves(cls, artifact: ArtifactFacts) -> bool:
        """Whether it can score an artifact whose backend does not name it among those that can.

        True only where the facts are enough to know. A backend that names a runtime knows more, and is not overruled.
        """
        del artifact
        return False

    @classmethod
    def lacks(
        cls, packed: Collection[PackedWeights], endpoint: str | None, others: Sequence[str]
    ) -> RecipeError | None:
        """Why it cannot be had on this machine; None if it can. Quick: nothing is loaded or asked.

        Args:
            packed: every kind of packed weights in the artifact.
            endpoint: address of a running server, or None.
            others: what else serves the artifact, the preferred one first.

        Raises:
            RecipeError: something that was asked for is not there, so that no other runtime may step in silently.
        """
        del packed, endpoint, others
        return None

    @classmethod
    def commands(cls, manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What serves an artifact from inside its folder: a name, and the command or Python code, for the model card.

        Args:
            manifest: the folder's `export.json`.
            artifact: one of its `artifacts`.
        """
        del manifest, artifact
        return []

    @abstractmethod
    def score(
        self, artifact: Path, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None
    ) -> TokenScores:
        """Score an artifact.

        Args:
            artifact: a file or a model folder.
            windows: what to score.
            on_window: called with 1 after each window.
            on_logits: called with all logits of each window, by a runtime that has them.

        Raises:
            RuntimeScoreError: the runtime cannot load or run it.
            RuntimeUnavailableError: of those, what the runtime can tell to be no fault of the artifact's.
        """

    @abstractmethod
    def version(self) -> str:
        """Name and version, for the manifest."""

    def session(self, artifact: Path, n_ctx: int) -> AbstractContextManager[Session] | None:
        """Load an artifact for prompts and continuations of `n_ctx` tokens together.

        Returns:
            None if the runtime does nothing but score.

        Raises:
            RuntimeScoreError: on entering: the runtime cannot load it; see `score`.
        """
        del artifact, n_ctx
        return None


def shell_entry(artifact: Mapping[str, Any]) -> str:
    """The entry of an artifact, quoted for a shell. A name that begins with a dash is no option.

    Args:
        artifact: one of the `artifacts` of an `export.json`.
    """
    entry = str(artifact["entry"])
    return shlex.quote(f"./{entry}" if entry.startswith("-") else entry)


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
    blocks = torch.split(logits, block_rows(logits))
    total = torch.cat([torch.logsumexp(block, dim=1) for block in blocks]).double()
    top = torch.cat([block.argmax(dim=1) for block in blocks])
    return (right - total).cpu().numpy(), top.cpu().numpy()


def block_rows(logits: Any) -> int:
    """Rows of logits to work on at a time: on a processor, a block in the cache for every thread."""
    import torch

    if logits.device.type != "cpu":
        return max(1, len(logits))
    row_bytes: int = logits.shape[1] * logits.element_size()
    return max(1, torch.get_num_threads() * BLOCK_BYTES // row_bytes)


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
