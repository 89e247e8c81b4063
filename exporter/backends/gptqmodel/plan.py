"""The plan of one artifact of GPTQModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.backends.output_plan import OutputPlan


@dataclass(frozen=True, kw_only=True)
class GptqModelPlan(OutputPlan):
    """The plan of a folder that GPTQModel writes.

    Attributes:
        merged: the model folder that it is given.
        quantize: arguments of its QuantizeConfig.
        max_shard_bytes: largest size of one of its files.
    """

    merged: OutputPlan
    quantize: Mapping[str, Any]
    max_shard_bytes: int
