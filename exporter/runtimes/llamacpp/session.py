"""A GGUF file that llama.cpp has loaded, and what it answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter.errors import RuntimeScoreError
from exporter.runtimes.base import Continuation

# Tokens of a prompt that are decoded at once.
_BATCH = 512


class LlamaCppSession:
    """See `Session`.

    Chat templates are rendered by llama-cpp-python's own formatter from the file's metadata, as its server does.
    llama-server renders the same text with an engine of its own, which the C API does not offer:
    llama_chat_apply_template knows some templates by sight, and reads none.

    Args:
        artifact: the file.
        model: a `llama_model`.
        context: a `llama_context` of it.
        failed: makes the error for an action that llama.cpp could not do.
    """

    stop_evidence: Literal["generation", "vocabulary"] = "vocabulary"

    def __init__(self, artifact: Path, model: Any, context: Any, failed: Callable[[str], RuntimeScoreError]) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._artifact, self._model, self._context, self._failed = artifact, model, context, failed
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._size = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str, *, special: bool) -> list[int] | None:
        """See `Session`."""
        data = text.encode()
        # A token is a byte at least.
        room = len(data) + 1
        found = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), found, room, False, special)
        if count < 0:
            raise self._failed(f"tokenize (status {count}) with")
        return list(found[:count])

    def render(self, conversation: Mapping[str, Any]) -> str:
        """See `Session`."""
        formatter = self._formatter
        if formatter is None:
            raise _unrendered(self._artifact, "no tokenizer.chat_template in its metadata")
        from jinja2 import TemplateError

        try:
            return str(formatter(**conversation).prompt)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise _unrendered(self._artifact, f"a template that refuses a conversation ({error})") from None

    @cached_property
    def _formatter(self) -> Any:
        raw = self._lib.llama_model_chat_template(self._model, None)
        if not raw:
            return None
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        eos, bos = (self._text(find(self._vocab)) for find in (self._lib.llama_vocab_eos, self._lib.llama_vocab_bos))
        try:
            return Jinja2ChatFormatter(raw.decode(), eos_token=eos, bos_token=bos)
        except TemplateError as error:
            raise _unrendered(self._artifact, f"a template that cannot be read ({error})") from None

    def _text(self, token: int) -> str:
        return self._lib.llama_vocab_get_text(self._vocab, token).decode() if token >= 0 else ""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """See `Session`."""
        return [self._generate(prompt, tokens) for prompt in prompts]

    def _generate(self, prompt: Sequence[int], tokens: int) -> Continuation:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for first in range(0, len(prompt), _BATCH):
            self._decode(prompt[first : first + _BATCH])
        found: list[int] = []
        while True:
            logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(self._size,))
            found.append(int(logits.argmax()))
            if self.stops_on(found[-1]):
                return Continuation(tuple(found), stopped=True)
            if len(found) == tokens:
                return Continuation(tuple(found), stopped=False)
            self._decode(found[-1:])

    def _decode(self, ids: Sequence[int]) -> None:
        """Decode ids after those before; the last one's logits can be had then."""
        array = (ctypes.c_int32 * len(ids))(*ids)
        if status := self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(ids))):
            raise self._failed(f"decode (status {status})")

    def stops_on(self, token: int) -> bool:
        """See `Session`."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def stop_ids(self) -> frozenset[int] | None:
        """See `Session`."""
        return self._stop_ids

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        return frozenset(token for token in range(self._size) if self.stops_on(token))


def _unrendered(artifact: Path, found: str) -> RuntimeScoreError:
    return RuntimeScoreError(
        artifact.name, found=found, expected="the chat template of the source", remedy="Export it again."
    )
