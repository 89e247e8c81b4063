"""The reference: base + adapters as trained, unrounded, in float32.

It is kept as final hidden states, which one product with the head turns into logits: those would be a hundred times
larger. The adapters travel beside the weights and not merged, so a fault of the merge cannot hide in it; only where
they change the embedding or the head are the merged rows taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from exporter.calibration import Windows
from exporter.checkpoint import TensorReader
from exporter.merge import make_merger
from exporter.model import MergedModel
from exporter.runtimes.base import OnWindow, TokenScores, score_logits
from exporter.tour.passengers import Passengers, Settings, Walked
from exporter.tour.sizes import HEAD_ROWS, LOGIT_ROWS
from exporter.tour.states import Group
from exporter.tour.stream import Progress, Stream
from exporter.tour.walk import Walk


@dataclass(frozen=True)
class Head:
    """The matrix from final hidden states to logits.

    Attributes:
        weight: shape (vocabulary, hidden); in the base's own dtype where no adapter changes it, else float32.
    """

    weight: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32: (positions, hidden) to (positions, vocabulary)."""
        found = torch.empty(hidden.shape[0], self.weight.shape[0], device=hidden.device)
        for first in range(0, self.weight.shape[0], HEAD_ROWS):
            rows = self.weight[first : first + HEAD_ROWS].float()
            torch.mm(hidden, rows.T, out=found[:, first : first + HEAD_ROWS])
        return found


class Reference:
    """What the trained model says about the scored positions of all windows.

    Args:
        windows: what is scored.
        hidden: final hidden states of the scored positions, after the norm: float32, (windows, scored, hidden).
        head: turns them into logits.
        on_window: called with 1 after each window.

    Attributes:
        scores: log-probabilities of the right tokens, and the likeliest tokens.
    """

    def __init__(self, windows: Windows, hidden: torch.Tensor, head: Head, on_window: OnWindow) -> None:
        self.windows, self._hidden, self._head = windows, hidden, head
        log_probabilities, top_tokens = [], []
        for number, window in enumerate(windows.ids):
            targets = torch.tensor(window[windows.first_scored + 1 :], device=hidden.device)
            right, top = zip(
                *(score_logits(logits, targets[rows]) for rows, logits in self.logits(number)), strict=True
            )
            log_probabilities.append(np.concatenate(right))
            top_tokens.append(np.concatenate(top))
            on_window(1)
        self.scores = TokenScores(np.stack(log_probabilities), np.stack(top_tokens))

    def logits(self, window: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of one window, a few positions at a time: which, and float32 (positions, vocabulary)."""
        with torch.inference_mode():
            for first in range(0, self.windows.scored, LOGIT_ROWS):
                rows = slice(first, min(first + LOGIT_ROWS, self.windows.scored))
                yield rows, self._head.logits(self._hidden[window, rows])


def finish_reference(walk: Walk, walked: Walked, windows: Windows, device: str, on_window: OnWindow) -> Reference:
    """Norm, head and scores, once every layer has been walked.

    Args:
        walk: gives the model's own norm.
        walked: what it brought back; the evaluation windows are the first of its groups, and are closed.
        windows: the evaluation windows.
        device: where the head computes.
        on_window: called with 1 after each window is scored.
    """
    if walked.norm is None or walked.head is None:
        raise ValueError("the walk had no evaluation windows")
    states = walked.states[0]
    scored = torch.empty(states.group.windows, windows.scored, states.hidden, device=device)
    for number in range(states.group.windows):
        last = states.read(slice(number, number + 1)).to(device)
        scored[number] = walk.normalize(last, walked.norm)[0, windows.first_scored : -1].float()
    states.close()
    walk.set_threads()
    return Reference(windows, scored, Head(walked.head), on_window)


def evaluation_group(windows: Windows) -> Group:
    """The evaluation windows as travellers."""
    return Group("evaluation", np.array(windows.ids, dtype=np.int64))


def score_reference(
    model: MergedModel,
    windows: Windows,
    device: str,
    on_window: OnWindow,
    *,
    threads: int = 1,
    on_layer: Callable[[int, int], None] = lambda _done, _layers: None,
) -> Reference:
    """Walk through the model for the reference alone; nothing is written.

    Args:
        model: the merged model.
        windows: what to score.
        device: where layers and head compute.
        on_window: called with 1 after each window is scored.
        threads: threads on the CPU.
        on_layer: called after each layer with the number of layers that are done, and of all.

    Raises:
        RuntimeScoreError: transformers or peft cannot make the model.
        NonFiniteTensorError: a tensor holds NaN or infinity.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(TensorReader())
        stream = Stream(
            model, (), make_merger(device, reader), threads=threads, block_bytes=4 << 20, progress=Progress()
        )
        stack.callback(stream.close)
        settings = Settings(device, threads=threads, on_layer=on_layer)
        walk = Walk(
            model, stream, Passengers(), evaluation=evaluation_group(windows), calibration=None, settings=settings
        )
        return finish_reference(walk, walk.run(), windows, device, on_window)
