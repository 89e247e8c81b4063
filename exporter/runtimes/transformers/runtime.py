"""transformers in this process: for safetensors and GPTQ folders."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil

from exporter.errors import RecipeError, RuntimeScoreError
from exporter.libraries import gptqmodel
from exporter.libraries.quiet import import_transformers
from exporter.runtimes.artifact_facts import ArtifactFacts, PackedWeights
from exporter.runtimes.base import OnLogits, OnWindow, Runtime, TokenScores, score_logits
from exporter.runtimes.transformers.session import TransformersSession
from exporter.tokens.windows import Windows

_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="auto")
chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
print(tokenizer.decode(model.generate(**chat, max_new_tokens=200)[0, chat["input_ids"].shape[1] :]))"""


class Transformers(Runtime):
    """Scores a model folder in the dtype that it is stored in."""

    name: ClassVar[str] = "transformers"

    @classmethod
    def open(cls, device: str, endpoint: str | None) -> Transformers:
        """See `Runtime`."""
        del endpoint
        return cls(device)

    @classmethod
    def serves(cls, artifact: ArtifactFacts) -> bool:
        """See `Runtime`: any model folder of plain weights. Backends know whether it loads their packed ones."""
        return artifact.is_plain_model_folder

    @classmethod
    def lacks(
        cls, packed: Collection[PackedWeights], endpoint: str | None, others: Sequence[str]
    ) -> RecipeError | None:
        """See `Runtime`: GPTQ weights need packages that nothing else does."""
        del endpoint, others
        if any(one.method == "gptq" for one in packed) and (lacking := gptqmodel.missing_packages()):
            return RecipeError(
                "runtime transformers",
                found=f"no {' and no '.join(lacking)}",
                expected="what it loads GPTQ weights with",
                remedy=f"{gptqmodel.INSTALL}, or choose another --runtime.",
            )
        return None

    @classmethod
    def commands(cls, manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
        """See `Runtime`."""
        del manifest, artifact
        return [("transformers", _CODE)]

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._packages: tuple[str, ...] = ("transformers", "torch")

    def version(self) -> str:
        """See `Runtime`."""
        from importlib.metadata import version

        return ", ".join(f"{name} {version(name)}" for name in self._packages)

    def score(
        self, artifact: Path, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None
    ) -> TokenScores:
        """See `Runtime`."""
        if gptqmodel.is_gptq(artifact):
            self._packages = ("transformers", "torch", *gptqmodel.PACKAGES)
        model = load_model(artifact, "auto", self._device)
        try:
            return score_model(model, windows, on_window, on_logits)
        except (RuntimeError, IndexError) as error:
            raise RuntimeScoreError(
                artifact.name,
                found=str(error)[:300],
                expected="a model that runs",
                remedy="Report it with this message.",
            ) from None

    @contextmanager
    def session(self, artifact: Path, n_ctx: int) -> Iterator[TransformersSession]:
        """See `Runtime`. A context needs no preparation here."""
        del n_ctx
        yield TransformersSession(artifact, load_model(artifact, "auto", self._device))


def load_model(folder: Path, dtype: Any, device: str) -> Any:
    """Load a causal language model, strictly: no weight may be missing, left over or of another shape.

    GPTQ weights stay packed and are multiplied with in the model's dtype; what is strict about them is the same.

    Args:
        folder: the model folder.
        dtype: a torch dtype, or `auto`.
        device: where it computes.

    Raises:
        RuntimeScoreError: transformers cannot load it, or loads it only in part.
        RuntimeUnavailableError: it has GPTQ weights, and what transformers loads those with is not installed.
    """
    import torch

    transformers = import_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    arguments = gptqmodel.loading_arguments(folder)
    try:
        with warnings.catch_warnings():
            # It says at length that the folder's own quantization counts.
            warnings.simplefilter("ignore")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, **arguments
            )
    except Exception as error:
        # What it and gptqmodel raise for a configuration that they cannot take is of many kinds.
        raise RuntimeScoreError(
            folder.name, found=str(error)[:300], expected="a folder that transformers loads", remedy="Check the model."
        ) from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise RuntimeScoreError(
                folder.name,
                found=f"{problem.replace('_', ' ')}: {', '.join(map(str, sorted(info[problem])[:3]))}",
                expected="every weight in its place",
                remedy="Check the model's configuration against its weights.",
            )
    return model.to(device).eval()


def score_model(model: Any, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None) -> TokenScores:
    """Score windows with a causal language model, taking the head's product only where predictions are scored.

    Args:
        model: a transformers model: `model.model` and `model.lm_head` are used.
        windows: what to score.
        on_window: called with 1 after each window.
        on_logits: called with all logits of each window.
    """
    import torch

    log_probabilities, top_tokens = [], []
    with torch.inference_mode():
        for number, window in enumerate(windows.ids):
            ids = torch.tensor([window], device=model.device)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[0, windows.first_scored : -1]).float()
            right, top = score_logits(logits, ids[0, windows.first_scored + 1 :])
            log_probabilities.append(right)
            top_tokens.append(top)
            if on_logits is not None:
                on_logits(number, logits)
            on_window(1)
    return TokenScores(np.stack(log_probabilities), np.stack(top_tokens))
