"""llama.cpp in this process, through llama-cpp-python's bindings of its C API."""

from __future__ import annotations

import ctypes
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil

from exporter.errors import RuntimeScoreError, RuntimeUnavailableError
from exporter.runtimes.artifact_facts import ArtifactFacts
from exporter.runtimes.base import (
    OnLogits,
    OnWindow,
    Runtime,
    TokenScores,
    check_vocabulary,
    score_logits,
    shell_entry,
)
from exporter.runtimes.llamacpp.session import LlamaCppSession
from exporter.tokens.windows import Windows


def ollama_name(name: str, quant: str) -> str:
    """`name:tag`, of the letters that Ollama takes (types/model/name.go)."""
    plain = [re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("-.") for part in (name, quant)]
    return f"{plain[0] or 'model'}:{plain[1] or 'latest'}"


_Listeners = tuple[OnWindow, OnLogits | None]


class LlamaCpp(Runtime):
    """Scores a GGUF file with llama.cpp, one window at a time in one sequence."""

    name: ClassVar[str] = "llamacpp"
    title: ClassVar[str] = "llama.cpp"

    @classmethod
    def serves(cls, artifact: ArtifactFacts) -> bool:
        """See `Runtime`: any GGUF file."""
        return artifact.entry.endswith(".gguf")

    @classmethod
    def commands(cls, manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
        """See `Runtime`: the server, the command line, and Ollama if there is a Modelfile."""
        entry = shell_entry(artifact)
        commands = [("llama-server", f"llama-server -m {entry}"), ("llama-cli", f"llama-cli -m {entry}")]
        modelfile = next((file for file in artifact["files"] if file.partition(".")[0] == "Modelfile"), None)
        if modelfile is not None:
            model = ollama_name(str(manifest["name"]), artifact["quant"])
            commands.append(("ollama", f"ollama create {model} -f {shlex.quote(modelfile)}\nollama run {model}"))
        return commands

    def version(self) -> str:
        """See `Runtime`."""
        from importlib.metadata import version

        return f"llama-cpp-python {version('llama-cpp-python')}"

    def score(
        self, artifact: Path, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None
    ) -> TokenScores:
        """See `Runtime`."""
        import llama_cpp

        # Kept in a local so that the callback outlives every call.
        log, lines = _capture_log(llama_cpp)
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        try:
            return self._load_and_score(llama_cpp, artifact, windows, (on_window, on_logits), lines)
        finally:
            _restore_log(llama_cpp)

    @contextmanager
    def session(self, artifact: Path, n_ctx: int) -> Iterator[LlamaCppSession]:
        """See `Runtime`."""
        import llama_cpp

        log, lines = _capture_log(llama_cpp)
        with ExitStack() as stack:
            llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
            stack.callback(_restore_log, llama_cpp)
            llama_cpp.llama_backend_init()
            model = llama_cpp.llama_model_load_from_file(str(artifact).encode(), llama_cpp.llama_model_default_params())
            if not model:
                raise _failed(artifact, "load", lines)
            stack.callback(llama_cpp.llama_model_free, model)
            context = self._context(llama_cpp, model, n_ctx)
            if not context:
                raise _failed(artifact, "make a context for", lines)
            stack.callback(llama_cpp.llama_free, context)
            yield LlamaCppSession(artifact, model, context, lambda action: _failed(artifact, action, lines))

    def _load_and_score(
        self, llama_cpp: Any, artifact: Path, windows: Windows, listeners: _Listeners, lines: list[str]
    ) -> TokenScores:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(artifact).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise _failed(artifact, "load", lines)
        try:
            context = self._context(llama_cpp, model, windows.n_ctx)
            if not context:
                raise _failed(artifact, "make a context for", lines)
            try:
                return self._score(llama_cpp, model, context, windows, listeners, artifact, lines)
            finally:
                llama_cpp.llama_free(context)
        finally:
            llama_cpp.llama_model_free(model)

    def _context(self, llama_cpp: Any, model: Any, n_ctx: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = n_ctx
        parameters.n_ubatch = min(512, n_ctx)
        parameters.n_threads = parameters.n_threads_batch = psutil.cpu_count(logical=False) or 1
        return llama_cpp.llama_init_from_model(model, parameters)

    def _score(
        self,
        llama_cpp: Any,
        model: Any,
        context: Any,
        windows: Windows,
        listeners: _Listeners,
        artifact: Path,
        lines: list[str],
    ) -> TokenScores:
        import torch

        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        check_vocabulary(artifact, windows, size)
        batch = llama_cpp.llama_batch_init(windows.n_ctx, 0, 1)
        log_probabilities, top_tokens = [], []
        on_window, on_logits = listeners
        try:
            for number, window in enumerate(windows.ids):
                _fill(batch, window, windows.first_scored)
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
                if status := llama_cpp.llama_decode(context, batch):
                    raise _failed(artifact, f"decode (status {status})", lines)
                # One row for every position whose logits were asked for, in order.
                raw = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(windows.scored, size))
                logits, targets = torch.from_numpy(raw), torch.tensor(window[windows.first_scored + 1 :])
                right, top = score_logits(logits, targets)
                log_probabilities.append(right)
                top_tokens.append(top)
                if on_logits is not None:
                    on_logits(number, logits)
                on_window(1)
        finally:
            llama_cpp.llama_batch_free(batch)
        return TokenScores(np.stack(log_probabilities), np.stack(top_tokens))


def _fill(batch: Any, window: tuple[int, ...], first_scored: int) -> None:
    """Put a window into a batch as one sequence, asking for logits where predictions are scored."""
    batch.n_tokens = len(window)
    for position, token in enumerate(window):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = first_scored <= position < len(window) - 1


# ggml_log_level (ggml/include/ggml.h)
_ERROR, _CONTINUATION = 4, 5


def _capture_log(llama_cpp: Any) -> tuple[Any, list[str]]:
    """A log callback that keeps what llama.cpp calls an error, and prints nothing."""
    errors: list[str] = []
    last = [0]

    def keep(level: int, text: bytes, _data: object) -> None:
        last[0] = last[0] if level == _CONTINUATION else level
        if last[0] == _ERROR and len(errors) < 40:
            errors.append(text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(keep), errors


def _restore_log(llama_cpp: Any) -> None:
    """Put llama-cpp-python's own callback back: llama.cpp must not keep the address of one that is freed."""
    from llama_cpp import _logger

    llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


# What it says where an allocation fails: ggml/src/ggml.c, ggml-alloc.c and ggml-backend.cpp, src/llama-model.cpp.
# A header that claims too much ends in other words (ggml/src/gguf.cpp).
_NO_MEMORY = re.compile(
    r"insufficient memory|(failed|unable) to allocate|(cannot allocate|out of) memory|std::bad_alloc", re.IGNORECASE
)


def _failed(artifact: Path, action: str, errors: list[str]) -> RuntimeScoreError:
    """The error that a file cannot be used, in llama.cpp's words; those tell memory that ran out from all else."""
    said = "".join(errors).strip()
    reason = " / ".join(said.splitlines()[:4])
    found = f"llama.cpp could not {action} it: {reason or 'it gave no reason'}"
    if _NO_MEMORY.search(said):
        return RuntimeUnavailableError(
            artifact.name,
            found=found,
            expected="memory for the file and its context",
            remedy="End what else takes memory, or use a machine with more of it.",
        )
    return RuntimeScoreError(
        artifact.name,
        found=found,
        expected="a file that llama.cpp serves",
        remedy="If nothing else is wrong with the file, report it with llama.cpp's words.",
    )
