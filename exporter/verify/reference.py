"""The reference: base + adapters as trained, unrounded, in float32. The adapters stay beside the weights, so a fault of
the merge cannot hide in it."""

from __future__ import annotations

import gc
from typing import Any

from exporter.calibration import Windows
from exporter.errors import RuntimeScoreError
from exporter.model import MergedModel
from exporter.runtimes.base import OnWindow, TokenScores


def reference_bytes(model: MergedModel, windows_ctx: int) -> int:
    """Memory that the reference needs: float32 weights and adapters, and the logits of one window with their copies."""
    adapters = sum(
        4 * (update.rank * (update.a.shape[1] + update.b.shape[0]))
        for adapter in model.adapters
        for update in adapter.updates.values()
    )
    vocabulary = int(model.config.get("vocab_size") or 0)
    return 4 * model.parameters + adapters + 3 * 4 * vocabulary * windows_ctx // 2


def score_reference(model: MergedModel, windows: Windows, device: str, on_window: OnWindow) -> TokenScores:
    """Score the windows with transformers and peft.

    Raises:
        RuntimeScoreError: transformers or peft cannot load base and adapters.
    """
    import torch

    from exporter.runtimes.transformers import load_model, score_model

    loaded = load_model(model.base.folder, torch.float32, device)
    if model.adapters:
        loaded = _with_adapters(loaded, model)
    try:
        return score_model(loaded, windows, on_window)
    finally:
        del loaded
        gc.collect()


def _with_adapters(loaded: Any, model: MergedModel) -> Any:
    """Attach every adapter with peft, active and unmerged."""
    import warnings

    from peft import PeftModel

    names = [f"adapter_{index}" for index in range(len(model.adapters))]
    try:
        with warnings.catch_warnings():
            # peft warns about tied embeddings; here the adapter is never merged into them.
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(loaded, model.adapters[0].folder, adapter_name=names[0])
            for name, adapter in zip(names[1:], model.adapters[1:], strict=True):
                wrapped.load_adapter(str(adapter.folder), adapter_name=name)
            wrapped.base_model.set_adapter(names)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RuntimeScoreError(
            "reference", found=str(error)[:300], expected="an adapter that peft loads", remedy="Check the adapter."
        ) from None
    return wrapped.get_base_model().eval()
