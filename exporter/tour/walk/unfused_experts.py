"""Mixture-of-experts blocks with a linear layer a matrix, as checkpoints store them.

transformers keeps all experts of a block in two three-dimensional parameters. Here each matrix is a module of its own
name again, so that weights go in as they are stored, peft finds its targets, and statistics are taken expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """One gated feed-forward expert.

    Args:
        hidden: input and output features.
        inner: features between.
    """

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class Experts(nn.ModuleList):
    """Takes the place of transformers' fused experts: same call, same result.

    Args:
        fused: the module that it replaces; gives sizes and activation.
    """

    def __init__(self, fused: Any) -> None:
        count, hidden, inner = fused.down_proj.shape
        super().__init__([Expert(hidden, inner) for _ in range(count)])
        self.act_fn = fused.act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Send every token through its experts.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), the experts that the router chose.
            top_k_weights: (tokens, k), their weights.

        Returns:
            (tokens, hidden), the weighted sum.
        """
        total = torch.zeros_like(hidden_states)
        for number, module in enumerate(self):
            expert: Any = module
            tokens, places = torch.where(top_k_index == number)
            if tokens.numel() == 0:
                continue
            chosen = hidden_states[tokens]
            inner = self.act_fn(expert.gate_proj(chosen)) * expert.up_proj(chosen)
            output = expert.down_proj(inner) * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts without biases."""
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = own["gate_up_proj"], own["down_proj"]
    return gate_up.ndim == 3 and gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])


def unfuse(model: nn.Module, names: Iterable[str]) -> None:
    """Replace fused experts wherever the checkpoint stores its experts one by one.

    Args:
        model: the model, on the meta device.
        names: names of the checkpoint's tensors.
    """
    stored = set(names)
    for name, module in list(model.named_modules()):
        if is_fused(module) and f"{name}.0.down_proj.weight" in stored:
            with torch.device("meta"):
                model.set_submodule(name, Experts(module))
