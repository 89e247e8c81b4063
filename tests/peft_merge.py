"""peft's own float32 merge, and how near ours is to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def with_peft(base: Path, adapters: Sequence[Path]) -> Any:
    """Base and adapters by transformers and peft in float32, unmerged, all adapters active."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        names = [f"adapter_{index}" for index in range(len(adapters))]
        model = PeftModel.from_pretrained(loaded, adapters[0], adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(str(adapter), adapter_name=name)
        model.base_model.set_adapter(names)
    return model.eval()


def merge_with_peft(base: Path, adapters: Sequence[Path]) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: Tensors = with_peft(base, adapters).merge_and_unload().state_dict()
    return state


def steps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between two float tensors of one dtype, element by element."""
    whole = torch.int32 if ours.dtype == torch.float32 else torch.int16

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(whole).long()
        magnitude = bits & torch.iinfo(whole).max
        return torch.where(bits < 0, -magnitude, magnitude)

    return (ordered(ours) - ordered(theirs)).abs()


def assert_same_merge(ours: Tensors, theirs: Tensors, dtype: torch.dtype) -> None:
    """At least 99.99 % of all elements bit-equal, the rest one unit in the last place apart."""
    total = unequal = 0
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        steps = steps_apart(tensor, theirs[name].to(dtype))
        assert steps.max() <= 1, name
        total, unequal = total + steps.numel(), unequal + int(steps.count_nonzero())
    assert unequal <= total // 10_000
