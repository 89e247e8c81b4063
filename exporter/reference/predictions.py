"""The reference: base + adapters as trained, unrounded, in float32.

It is kept as final hidden states, which one product with the head turns into logits: those would be a hundred times
larger. The adapters travel beside the weights and not merged, so a fault of the merge cannot hide in it; only where
they change the embedding or the head are the merged rows taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from exporter.merge.model import MergedModel
from exporter.plan.reporter import Reporter
from exporter.runtimes.base import OnWindow, TokenScores, score_logits
from exporter.tokens.prompts import Prompt
from exporter.tokens.windows import Windows, windows_of
from exporter.tour.riders import Settings, Walked
from exporter.tour.walk.hidden_states import Group
from exporter.tour.walk.reference_walk import lone_walk
from exporter.tour.walk.sizes import HEAD_ROWS, KEEP_BYTES, LOGIT_ROWS
from exporter.tour.walk.walk import Walk

# What the names of the groups of prompts begin with.
_PROMPT = "prompt "


class Head(ABC):
    """The matrix from final hidden states to logits, wherever its rows are.

    Attributes:
        shape: (vocabulary, hidden).
        dtype: of its rows: the base's own where no adapter changes it, else float32.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @abstractmethod
    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count`, in `dtype`, on the device that computes; valid until the next call."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32: (positions, hidden) to (positions, vocabulary)."""
        found = torch.empty(hidden.shape[0], self.shape[0], device=hidden.device)
        exact = torch.empty(min(HEAD_ROWS, self.shape[0]), self.shape[1], device=hidden.device)
        for first in range(0, self.shape[0], HEAD_ROWS):
            rows = self.rows(first, min(HEAD_ROWS, self.shape[0] - first))
            torch.mm(hidden, exact[: len(rows)].copy_(rows).T, out=found[:, first : first + HEAD_ROWS])
        return found


class HeldHead(Head):
    """A head that is in memory.

    Args:
        weight: shape (vocabulary, hidden).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype

    def rows(self, first: int, count: int) -> torch.Tensor:
        """See `Head`."""
        return self._weight[first : first + count]


class Reference:
    """What the trained model says about the scored positions of all windows.

    A product with a large head takes as long as many layers. So the reference is scored with the logits that the first
    artifact's are compared with, and `scores` computes only those of windows that nothing was compared on.

    Args:
        windows: what is scored.
        hidden: final hidden states of the scored positions of a window by its number, after the norm: float32,
            (scored, hidden).
        head: turns them into logits.
        scores: if they are known.
        prompts: final hidden states of the last token of each prompt that was walked along, after the norm: float32,
            (prompts, hidden); None if none was.
    """

    def __init__(
        self,
        windows: Windows,
        hidden: Callable[[int], torch.Tensor],
        head: Head,
        scores: TokenScores | None = None,
        prompts: torch.Tensor | None = None,
    ) -> None:
        self.windows, self.hidden, self.head, self.prompts = windows, hidden, head, prompts
        shape = (len(windows.ids), windows.scored)
        self._scores = scores or TokenScores(np.zeros(shape), np.zeros(shape, dtype=np.int64))
        self._missing = set() if scores else set(range(len(windows.ids)))

    @property
    def scores(self) -> TokenScores:
        """Log-probabilities of the right tokens, and the likeliest tokens."""
        self.complete()
        return self._scores

    def complete(self, on_window: OnWindow = lambda _: None) -> None:
        """Score every window that is not yet, calling `on_window` with 1 after each."""
        for window in sorted(self._missing):
            for _ in self.logits(window):
                pass
            on_window(1)

    def logits(self, window: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of one window, a few positions at a time: which, and float32 (positions, vocabulary)."""
        states = self.hidden(window)
        targets = torch.tensor(self.windows.ids[window][self.windows.first_scored + 1 :], device=states.device)
        new = window in self._missing
        for rows, logits in window_logits(self.windows, states, self.head):
            if new:
                right, top = score_logits(logits, targets[rows])
                self._scores.log_probabilities[window, rows], self._scores.top_tokens[window, rows] = right, top
            yield rows, logits
        self._missing.discard(window)


def joined(first: Reference, further: Sequence[Reference]) -> Reference:
    """One model on the windows of several references, in their order; their states stay where they are."""
    if not further:
        return first
    parts = [first, *further]
    places = [(part, number) for part in parts for number in range(len(part.windows.ids))]

    def hidden(window: int) -> torch.Tensor:
        part, number = places[window]
        return part.hidden(number)

    ids = [part.windows.ids[number] for part, number in places]
    scores = TokenScores(
        np.concatenate([part.scores.log_probabilities for part in parts]),
        np.concatenate([part.scores.top_tokens for part in parts]),
    )
    return Reference(windows_of(ids, first.windows), hidden, first.head, scores, first.prompts)


def part_of(whole: Reference, windows: slice) -> Reference:
    """Some of the windows of a reference whose scores are known; states and head stay where they are."""
    numbers = range(len(whole.windows.ids))[windows]
    scores = TokenScores(whole.scores.log_probabilities[windows], whole.scores.top_tokens[windows])
    ids = whole.windows.ids[windows]
    return Reference(
        windows_of(ids, whole.windows), lambda window: whole.hidden(numbers[window]), whole.head, scores, whole.prompts
    )


def window_logits(windows: Windows, hidden: torch.Tensor, head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits of one window's scored positions, a few at a time.

    Args:
        windows: say how many positions are scored.
        hidden: final hidden states of the window: float32, (scored, hidden).
        head: turns them into logits.

    Yields:
        Which positions, and float32 (positions, vocabulary).
    """
    for first in range(0, windows.scored, LOGIT_ROWS):
        rows = slice(first, min(first + LOGIT_ROWS, windows.scored))
        with torch.inference_mode():
            logits = head.logits(hidden[rows])
        yield rows, logits


def finish_reference(walk: Walk, walked: Walked, windows: Windows, device: str) -> Reference:
    """Norm and head, once every layer has been walked.

    Args:
        walk: gives the model's own norm.
        walked: what it brought back; the evaluation windows are the first of its groups, prompts may follow. All of
            them are closed.
        windows: the evaluation windows.
        device: where the head computes.
    """
    if walked.norm is None or walked.head is None:
        raise ValueError("the walk had no evaluation windows")
    states = walked.states[0]
    scored = torch.empty(states.group.windows, windows.scored, states.hidden, device=device)
    for number in range(states.group.windows):
        last = states.read(slice(number, number + 1)).to(device)
        scored[number] = walk.normalize(last, walked.norm)[0, windows.first_scored : -1].float()
    states.close()
    last_tokens = []
    for prompt in walked.states[1:]:
        if prompt.group.name.startswith(_PROMPT):
            last = prompt.read(slice(0, 1))[:, -1:].to(device)
            last_tokens.append(walk.normalize(last, walked.norm)[0].float())
        prompt.close()
    walk.set_threads()
    prompts = torch.cat(last_tokens) if last_tokens else None
    return Reference(windows, scored.__getitem__, HeldHead(walked.head), prompts=prompts)


def prompt_groups(prompts: Sequence[Prompt]) -> list[Group]:
    """Prompts as travellers: each is a group, as each has a length of its own."""
    return [Group(f"{_PROMPT}{prompt.name}", np.array([prompt.ids], dtype=np.int64)) for prompt in prompts]


def evaluation_group(windows: Windows) -> Group:
    """The evaluation windows as travellers."""
    return Group("evaluation", np.array(windows.ids, dtype=np.int64))


def score_reference(
    model: MergedModel,
    windows: Windows,
    device: str,
    *,
    threads: int = 1,
    on_layer: Callable[[int, int], None] = lambda _done, _layers: None,
    on_file: Callable[[Path], None] = lambda _: None,
    compute_dtype: str = "float32",
    scratch: Path | None = None,
    key: str = "",
    keep_bytes: int = KEEP_BYTES,
    prompts: Sequence[Prompt] = (),
) -> Reference:
    """Walk through the model for the reference alone; nothing is written.

    Args:
        model: the merged model.
        windows: what to score.
        device: where layers and head compute.
        threads: threads on the CPU.
        on_layer: called after each layer with the number of layers that are done, and of all.
        on_file: called with each file of the base when the walk gets to it.
        compute_dtype: what the layers compute in: float32 or bfloat16.
        scratch: folder for what a killed walk goes on from, and for hidden states that are too many for memory; None
            for neither.
        key: what the walk is for; it goes on from what is in `scratch` only under the same key.
        keep_bytes: hidden states that stay in memory where there is a folder for the others.
        prompts: walked along too.

    Raises:
        RuntimeScoreError: transformers or peft cannot make the model.
        NonFiniteTensorError: a tensor holds NaN or infinity.
    """
    settings = Settings(
        device,
        dtype=getattr(torch, compute_dtype),
        threads=threads,
        keep_bytes=keep_bytes,
        scratch=scratch,
        key=key,
        ahead=device != "cpu",
        on_layer=on_layer,
    )
    with lone_walk(model, [evaluation_group(windows), *prompt_groups(prompts)], settings, on_file=on_file) as walk:
        return finish_reference(walk, walk.run(), windows, device)


def walk_reference(
    model: MergedModel,
    windows: Windows,
    device: str,
    reporter: Reporter,
    *,
    threads: int,
    on_file: Callable[[Path], None] = lambda _: None,
    compute_dtype: str = "float32",
    scratch: Path | None = None,
    key: str = "",
    keep_bytes: int = KEEP_BYTES,
    prompts: Sequence[Prompt] = (),
) -> Reference:
    """Walk for the reference alone, and tell the reporter; see `score_reference`."""

    reporter.walking(windows)

    return score_reference(
        model,
        windows,
        device,
        threads=threads,
        on_layer=reporter.layer,
        on_file=on_file,
        compute_dtype=compute_dtype,
        scratch=scratch,
        key=key,
        keep_bytes=keep_bytes,
        prompts=prompts,
    )
