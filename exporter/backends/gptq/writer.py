"""Solves, packs and stores the matrices of a GPTQ folder as the tour brings their Hessians."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch

from exporter.backends.base import Finding, Solution
from exporter.backends.gptq.bit_packing import CheckpointFormat, pack
from exporter.backends.gptq.options import FEWEST_TOKENS, Scheme
from exporter.backends.gptq.plan import GptqPlan, planned_parts
from exporter.backends.gptq.solver.factor import Factor, Ordering, factorize
from exporter.backends.gptq.solver.grid import Grid
from exporter.backends.gptq.solver.solver import Quantized, dequantize, round_to_nearest, solve
from exporter.backends.hessian import Moments
from exporter.backends.output_plan import TensorPlan
from exporter.backends.writing.checksums import as_text, joined, row_checksums
from exporter.backends.writing.offset_writer import OffsetWriter, encode_float


class GptqWriter(OffsetWriter):
    """Writes one GPTQ folder: what stays in 16 bits as it comes, the rest when it is solved for.

    Args:
        plan: the folder's plan.
        folder: where its files go.
        resume: keep what is in the files.

    Raises:
        WriteError: the disk is full or a file cannot be made.
    """

    def __init__(self, plan: GptqPlan, folder: Path, *, resume: bool) -> None:
        super().__init__(plan, folder, _encode, resume=resume)
        self._schemes = plan.schemes
        self._format = cast(CheckpointFormat, plan.checkpoint_format)
        self._parts = planned_parts(plan)

    def solve(self, weights: Mapping[str, torch.Tensor], moments: Moments) -> Solution:
        """See `Writer`. All matrices of one call are quantized alike.

        Raises:
            FactorizationError: the Hessian cannot be factored, however much it is damped.
            NonFiniteTensorError: a weight or the Hessian holds NaN or infinity.
        """
        scheme = self._schemes[next(iter(weights))]
        grid = Grid(scheme.bits, scheme.group_size, scheme.sym)
        stacked = torch.cat(list(weights.values()))
        factor = None
        if moments.tokens < FEWEST_TOKENS:
            importance = moments.diagonal() if moments.tokens else None
            quantized = round_to_nearest(stacked, grid, importance)
        else:
            factor = _factor(moments, scheme)
            quantized = solve(stacked, factor, grid)
        del stacked
        solved, findings, first = {}, [], 0
        for name, weight in weights.items():
            rows = quantized.rows(first, weight.shape[0])
            first += weight.shape[0]
            solved[name] = values = dequantize(rows)
            # Before they are packed: what the packer does to them shows.
            findings.append(_finding(name, rows, moments.tokens, factor, _checksum(values)))
            self._store(name, rows, scheme.bits)
        return Solution(solved, tuple(findings))

    def _store(self, name: str, quantized: Quantized, bits: int) -> None:
        packed = pack(quantized.codes, quantized.scales, quantized.zeros, quantized.g_idx, bits, self._format)
        for part, plan in self._parts[name].items():
            tensor: torch.Tensor = getattr(packed, part)
            self.store(plan, tensor.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data)


def _factor(moments: Moments, scheme: Scheme) -> Factor:
    ordering: Ordering = "desc_act" if scheme.desc_act else "groups"
    return factorize(moments.matrix(), scheme.group_size, ordering, scheme.damp)


def _checksum(values: torch.Tensor) -> str:
    """Of a matrix as it is computed with: what its codes, scales, zeros and groups stand for before they are packed."""
    return as_text(joined(row_checksums(values.cpu().numpy().view(np.uint8))))


def _finding(name: str, quantized: Quantized, tokens: int, factor: Factor | None, checksum: str) -> Finding:
    return Finding(
        name=name,
        tokens=tokens,
        loss=quantized.loss,
        damp=factor.damp_used if factor else 0.0,
        attempts=factor.attempts if factor else 0,
        dead=quantized.dead,
        rounded=factor is None,
        checksum=checksum,
    )


def _encode(tensor: TensorPlan, block: torch.Tensor) -> memoryview:
    return encode_float(block, tensor.type, tensor.name)
