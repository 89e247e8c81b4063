"""What the trained model thinks of continuations that artifacts chose: one walk for those of all artifacts.

A reference pack, which has no model to walk through, knows what follows each prompt, and so the first token of each.

To generate with the reference would take a walk through all layers for every token. Instead, prompt and continuation
are sent through at once: at every position it shows what the reference would have chosen there, and by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from exporter.merge.model import MergedModel
from exporter.reference.predictions import Head, HeldHead
from exporter.tour.riders import Settings
from exporter.tour.walk.hidden_states import Group
from exporter.tour.walk.reference_walk import lone_walk

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Followed:
    """What the reference says along one continuation, or along as much of its beginning as is known.

    Attributes:
        likeliest: the token that it would have chosen at each position, int64, shape (tokens,).
        shortfall: log-probability of that token minus that of the token that was chosen, in nats: float64, same shape;
            0 where they are the same.
        margin: log-probability of its likeliest token minus that of its second, in nats: float64, same shape.
    """

    likeliest: npt.NDArray[np.int64]
    shortfall: npt.NDArray[np.float64]
    margin: npt.NDArray[np.float64]

    @property
    def first_divergence(self) -> int | None:
        """Index of the first token that is not the reference's likeliest, or None."""
        apart = np.flatnonzero(self.shortfall > 0)
        return int(apart[0]) if apart.size else None


def follow(
    model: MergedModel,
    wanted: Sequence[tuple[Tokens, Tokens]],
    device: str,
    *,
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[int, int], None] = lambda _done, _layers: None,
) -> Mapping[tuple[Tokens, Tokens], Followed]:
    """Walk the trained model along continuations.

    Args:
        model: the merged model.
        wanted: prompts with their continuations, none of them empty; the same pair twice is walked once.
        device: where layers and head compute.
        threads: threads on the CPU.
        dtype: what the layers compute in.
        on_layer: called after each layer with the number of layers that are done, and of all.

    Raises:
        RuntimeScoreError: transformers or peft cannot make the model.
        NonFiniteTensorError: a tensor holds NaN or infinity.
    """
    by_prompt: dict[Tokens, dict[Tokens, None]] = {}
    for prompt, continuation in wanted:
        by_prompt.setdefault(prompt, {})[continuation] = None
    groups = [_group(number, prompt, list(those)) for number, (prompt, those) in enumerate(by_prompt.items())]
    settings = Settings(device, dtype=dtype, threads=threads, on_layer=on_layer)
    with lone_walk(model, groups, settings) as walk:
        walked = walk.run()
        if walked.norm is None or walked.head is None:
            raise ValueError("the walk had no windows")
        walk.set_threads()
        head = HeldHead(walked.head)
        found = {}
        with torch.inference_mode():
            for states, (prompt, those) in zip(walked.states, by_prompt.items(), strict=True):
                for number, continuation in enumerate(those):
                    window = states.read(slice(number, number + 1))
                    # The last token of the prompt predicts the first of the continuation.
                    predicting = window[:, len(prompt) - 1 : len(prompt) - 1 + len(continuation)].to(device)
                    hidden = walk.normalize(predicting, walked.norm)[0].float()
                    found[prompt, continuation] = _follow(head.logits(hidden), continuation)
                states.close()
        return found


def follow_first(
    head: Head, states: torch.Tensor, prompts: Sequence[Tokens], wanted: Sequence[tuple[Tokens, Tokens]]
) -> Mapping[tuple[Tokens, Tokens], Followed]:
    """Hold the first token of each continuation against what follows its prompt.

    Args:
        head: from hidden states to logits.
        states: final hidden states of the last token of each prompt, after the norm: float32, (prompts, hidden).
        prompts: in their order.
        wanted: prompts with their continuations, none of them empty.
    """
    with torch.inference_mode():
        logits = dict(zip(prompts, head.logits(states), strict=True))
        return {(prompt, tokens): _follow(logits[prompt][None], tokens[:1]) for prompt, tokens in wanted}


def _group(number: int, prompt: Tokens, continuations: Sequence[Tokens]) -> Group:
    """A prompt with each of its continuations, filled up to one length: what comes after changes nothing before."""
    longest = max(map(len, continuations))
    filled = [(*prompt, *tokens, *prompt[:1] * (longest - len(tokens))) for tokens in continuations]
    return Group(f"continuations {number}", np.array(filled, dtype=np.int64))


def _follow(logits: torch.Tensor, continuation: Tokens) -> Followed:
    top = logits.topk(2, dim=1)
    tokens = torch.tensor(continuation, device=logits.device)
    # An artifact may have more tokens than the head has rows: those are never the reference's.
    known = tokens < logits.shape[1]
    chosen = logits.gather(1, torch.where(known, tokens, 0)[:, None])[:, 0]
    chosen = torch.where(known, chosen, -torch.inf)
    return Followed(
        likeliest=top.indices[:, 0].cpu().numpy(),
        shortfall=(top.values[:, 0].double() - chosen.double()).cpu().numpy(),
        margin=(top.values[:, 0].double() - top.values[:, 1].double()).cpu().numpy(),
    )
