"""How the demo's models are trained: little text, two cores, and the same bytes every time.

Each batch is halved between two workers, threads that compute with one thread each. Whatever the machine is busy with,
the sums are then made in the same order; and where it is busy, two workers that meet once a step lose far less time
than threads that meet in every operation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

WORKERS = 2
WARM_UP, DECAY = 0.05, 0.6
GRADIENT_NORM = 1.0
REPORT_EVERY = 25
# Newton-Schulz coefficients of Muon: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 4


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` batches of `rows` windows of `length` tokens."""

    steps: int
    rows: int
    length: int


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for weight matrices: on this little text it gets twice as far as AdamW.

    In float32: torch's own computes in bfloat16, which on a processor without bfloat16 arithmetic is 80 times slower.
    Updates are scaled as Liu et al., "Muon is scalable for LLM training", 2025, so that rates compare with AdamW's.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of every matrix; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                momenta = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonal(momenta), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the gradient mixed with its running mean."""
        assert parameter.grad is not None
        mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal factor, roughly, of each of a stack of matrices (n, rows, columns), by Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """The two workers; the caller computes with one thread too, and gets its own number of threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def base_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, in two halves that the workers step side by side; AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    rest = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    middle = len(matrices) // 2
    return [
        Muon(matrices[:middle], lr=0.03),
        Muon(matrices[middle:], lr=0.03),
        torch.optim.AdamW(rest, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: Any,
    ids: Tensor,
    phases: Sequence[Phase],
    optimizers: Sequence[torch.optim.Optimizer],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> None:
    """Train `model` in place on windows of the token stream `ids`.

    The rate warms up over a twentieth of the steps and falls to zero over the last 60 %.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = sum(phase.steps for phase in phases)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (WARM_UP * steps), (1 - step / steps) / DECAY)

    def gradients(windows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = _loss(model(input_ids=windows, use_cache=False).logits[:, :-1], windows[:, 1:])
        return loss.item(), torch.autograd.grad(loss, parameters)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(_batches(ids, phases), start=1):
        losses, halves = zip(*pool.map(gradients, batch.chunk(WORKERS)), strict=True)
        for parameter, *parts in zip(parameters, *halves, strict=True):
            parameter.grad = torch.stack(parts).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
        for schedule in schedules:
            schedule.step()
        if step % REPORT_EVERY == 0 or step == steps:
            left = (time.monotonic() - started) / step * (steps - step)
            say(f"  step {step} of {steps}: loss {sum(losses) / WORKERS:.2f}, {left:.0f} s left")
    model.eval()


def _batches(ids: Tensor, phases: Sequence[Phase]) -> Iterator[Tensor]:
    """Windows in a fixed shuffled order, all of the text before any of it again; every pass cuts it at other places."""
    generator = torch.Generator().manual_seed(7)
    for phase in phases:
        starts: list[int] = []
        for _ in range(phase.steps):
            while len(starts) < phase.rows:
                first = int(torch.randint(phase.length, (1,), generator=generator))
                count = (len(ids) - first) // phase.length
                starts += (first + phase.length * torch.randperm(count, generator=generator)).tolist()
            yield torch.stack([ids[start : start + phase.length] for start in starts[: phase.rows]])
            del starts[: phase.rows]


def _loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)


def perplexity(model: Any, ids: Tensor, pool: ThreadPoolExecutor, window: int = 512) -> float:
    """Perplexity by llama-perplexity's protocol: windows of 512, predictions of positions 257 to 511 scored."""
    half, count = window // 2, len(ids) // window

    @torch.inference_mode()
    def score(row: Tensor) -> float:
        logits = model(input_ids=row[None], use_cache=False).logits[:, half:-1]
        return _loss(logits, row[None, half + 1 :], reduction="sum").item()

    model.eval()
    total = sum(pool.map(score, ids[: count * window].view(count, window)))
    return math.exp(total / (count * (window - half - 1)))
