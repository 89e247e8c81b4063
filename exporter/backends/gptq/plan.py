"""The plan of one GPTQ artifact: the layers that are packed and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.backends.gptq.options import Scheme
from exporter.backends.output_plan import OutputPlan, TensorPlan
from exporter.families.roles import is_projection
from exporter.merge.model import MergedTensor


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
    return len(tensor.shape) == 2 and is_projection(tensor.name)


def planned_parts(plan: GptqPlan) -> dict[str, dict[str, TensorPlan]]:
    """The four stored tensors of each packed matrix, by the merged tensor's name and then by part."""
    parts: dict[str, dict[str, TensorPlan]] = {}
    for tensor in plan.tensors:
        (source,) = tensor.sources
        if source in plan.schemes:
            parts.setdefault(source, {})[tensor.name.rpartition(".")[2]] = tensor
    return parts
