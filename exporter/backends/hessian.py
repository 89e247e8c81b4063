"""Second moments of a layer's input: the Hessian of GPTQ, but for a constant factor."""

from __future__ import annotations

import torch

from exporter.errors import RefusalError

# Columns of a strip. Measured on 2 AVX2 cores with torch 2.13, 4096 x 4864 float32, best of 4, by
#   for j in range(0, n, 512): h[: j + 512, j : j + 512].addmm_(x[:, : j + 512].T, x[:, j : j + 512])
# 1.47 s; strips of 256 1.42 s; h.addmm_(x.T, x) 2.56 s; numpy.matmul(a.T, a, out=t) (syrk) and h += t 1.48 s, with a
# second matrix. 1024 x 4864: 0.34, 0.36, 0.68 and 0.48 s. 4096 x 896: 72, 70, 124 and 123 ms.
STRIP_COLUMNS = 512


class MomentsError(RefusalError):
    """Activations that do not fit the moments, or moments of nothing."""


class Moments:
    """Sums X^T X over batches of activations, in float32.

    Only the upper triangle is computed, which is half of the work. Holds one in_features x in_features matrix, and
    while adding, a float32 copy of the batch if it is not float32 already.

    Args:
        in_features: columns of the activations.
        device: where the matrix lies and the products are computed.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, activations: torch.Tensor) -> None:
        """Add a batch.

        Args:
            activations: shape (..., in_features), any floating dtype, contiguous or not.

        Raises:
            MomentsError: the last dimension is not in_features.
        """
        if activations.ndim < 1 or activations.shape[-1] != self.in_features:
            raise MomentsError(
                "activations",
                found=f"shape {tuple(activations.shape)}",
                expected=f"{self.in_features} columns",
                remedy="Give the input of the same linear layer.",
            )
        rows = activations.detach().reshape(-1, self.in_features).to(self._sum.device, torch.float32)
        self.tokens += rows.shape[0]
        for first in range(0, self.in_features, STRIP_COLUMNS):
            last = min(first + STRIP_COLUMNS, self.in_features)
            self._sum[:last, first:last].addmm_(rows[:, :last].T, rows[:, first:last])

    def diagonal(self) -> torch.Tensor:
        """Mean square of every column: float32, shape (in_features,).

        Raises:
            MomentsError: no tokens were added.
        """
        return self._sum.diagonal() / self._counted()

    def matrix(self) -> torch.Tensor:
        """The mean X^T X / tokens: float32, symmetric, shape (in_features, in_features), a new tensor.

        Raises:
            MomentsError: no tokens were added.
        """
        mean = self._sum / self._counted()
        for first in range(0, self.in_features, STRIP_COLUMNS):
            last = min(first + STRIP_COLUMNS, self.in_features)
            strip = mean[:last, first:last]
            square = strip[first:]
            square.copy_(square.triu() + square.triu(1).T)
            mean[first:last, :first] = strip[:first].T
        return mean

    def _counted(self) -> int:
        if self.tokens == 0:
            raise MomentsError(
                "second moments",
                found="no tokens",
                expected="at least one",
                remedy="Calibrate with more tokens, or round to nearest.",
            )
        return self.tokens
