"""An (IA)^3 adapter by peft: a method that is not built in, for tests that install one from outside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def make_ia3(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Save an adapter that scales outputs and, of `down_proj`, inputs; returns the tensors of peft's float32 merge."""
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = IA3Config(
        target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged
