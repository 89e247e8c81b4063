"""What differs between Qwen families, one small file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.families.base import Family
from exporter.families.qwen2 import QWEN2
from exporter.families.qwen3 import QWEN3
from exporter.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (QWEN2, QWEN3, QWEN3_MOE)

__all__ = ["FAMILIES", "Family", "find_family"]


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a model by the `architectures` and `model_type` of its configuration, or None."""
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        named = family.architecture in architectures or not architectures
        if named and config.get("model_type") == family.model_type:
            return family
    return None
