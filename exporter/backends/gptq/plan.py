"""The plan of one GPTQ artifact: the layers that are packed and their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.backends.gptq.options import Scheme
from exporter.backends.output_plan import OutputPlan, TensorPlan
from exporter.merge.model import MergedTensor

_LINEAR = re.compile(r"^.+\.layers\.\d+\..*_proj\.weight$")
# Layers that predict further tokens, beside the decoder's (Qwen3-Next, Qwen3.5): no walk comes through them.
_BESIDE = "mtp."


@dataclass(frozen=True)
class GptqPlan(OutputPlan):
    """The plan of a GPTQ folder.

    Attributes:
        schemes: how each packed matrix is quantized, by the merged tensor's name.
        checkpoint_format: `gptq` or `gptq_v2`.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict, repr=False)
    checkpoint_format: str = "gptq"


def is_quantized(tensor: MergedTensor) -> bool:
    """Whether a tensor is a matrix of a decoder layer, and neither a norm nor a router."""
    in_decoder = _LINEAR.match(tensor.name) is not None and not tensor.name.startswith(_BESIDE)
    return len(tensor.shape) == 2 and in_decoder


def planned_parts(plan: GptqPlan) -> dict[str, dict[str, TensorPlan]]:
    """The four stored tensors of each packed matrix, by the merged tensor's name and then by part."""
    parts: dict[str, dict[str, TensorPlan]] = {}
    for tensor in plan.tensors:
        if tensor.source in plan.schemes:
            parts.setdefault(tensor.source, {})[tensor.name.rpartition(".")[2]] = tensor
    return parts
