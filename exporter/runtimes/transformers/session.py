"""A model folder that transformers has loaded, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from exporter.errors import RuntimeScoreError
from exporter.libraries.quiet import import_transformers
from exporter.runtimes.base import Continuation

# What a folder's generation_config.json may say that would make a greedy choice another than the likeliest token.
_PLAIN: Mapping[str, Any] = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0,
    "min_length": 0, "suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None,
}  # fmt: skip


class TransformersSession:
    """See `Session`: the folder's own tokenizer, template and stop tokens.

    Args:
        artifact: the folder.
        model: its model.
    """

    stop_evidence: Literal["generation", "vocabulary"] = "generation"

    def __init__(self, artifact: Path, model: Any) -> None:
        self._artifact, self._model = artifact, model

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            return import_transformers().AutoTokenizer.from_pretrained(self._artifact)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RuntimeScoreError(
                self._artifact.name,
                found=f"a tokenizer that does not load ({str(error)[:300]})",
                expected="one that transformers loads",
                remedy="Check tokenizer_config.json against tokenizer.json.",
            ) from None

    def tokenize(self, text: str, *, special: bool) -> list[int] | None:
        """See `Session`."""
        found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
        return list(found["input_ids"])

    def render(self, conversation: Mapping[str, Any]) -> str:
        """See `Session`."""
        from jinja2 import TemplateError

        messages = conversation["messages"]
        options = {key: value for key, value in conversation.items() if key != "messages"}
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise RuntimeScoreError(
                self._artifact.name,
                found=f"no chat template, or one that refuses a conversation ({str(error)[:300]})",
                expected="the chat template of the source",
                remedy="Export it again.",
            ) from None
        return str(text)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """See `Session`."""
        found = []
        for prompt in prompts:
            ids = self._generate(prompt, tokens)
            found.append(Continuation(ids, stopped=ids[-1] in self._ends() if ids else False))
        return found

    def _generate(self, prompt: Sequence[int], tokens: int, forced: int | None = None) -> tuple[int, ...]:
        import torch

        def force(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(scores, -torch.inf)
            only[:, forced] = 0.0
            return only

        ids = torch.tensor([prompt], device=self._model.device)
        processors = {"logits_processor": [force]} if forced is not None else {}
        try:
            with torch.inference_mode():
                out = self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **_PLAIN, **processors
                )
        except (RuntimeError, IndexError, ValueError) as error:
            raise RuntimeScoreError(
                self._artifact.name,
                found=str(error)[:300],
                expected="a model that generates",
                remedy="Report it with this message.",
            ) from None
        return tuple(out[0, len(prompt) :].tolist())

    def stops_on(self, token: int) -> bool:
        """See `Session`."""
        return self._generate([token], 2, forced=token) == (token,)

    def _ends(self) -> frozenset[int]:
        named = self._model.generation_config.eos_token_id
        return frozenset(() if named is None else named if isinstance(named, list) else (named,))

    def stop_ids(self) -> frozenset[int] | None:
        """See `Session`."""
        return self._ends()
