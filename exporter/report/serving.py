"""The commands that serve an artifact, as one types them in its folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command, or a few lines of Python.

    Attributes:
        program: what it is for.
        text: what to type.
    """

    program: str
    text: str


def commands(manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[Command]:
    """One for each program that serves the artifact; none if no runtime is known for its format.

    Args:
        manifest: the folder's.
        artifact: one of its artifacts.
    """
    entry, name = artifact["entry"], manifest["name"]
    # A name that begins with a dash is no option.
    file = shlex.quote(f"./{entry}" if entry.startswith("-") else entry)
    by_runtime = {
        "llamacpp": Command("llama.cpp", f"llama-server -m {file}"),
        "vllm": Command("vLLM", f"vllm serve {file} --served-model-name {shlex.quote(name)}"),
        "transformers": Command("transformers", _PYTHON.format(folder=entry)),
    }
    found = [by_runtime[runtime] for runtime in artifact["runtimes"] if runtime in by_runtime]
    if "Modelfile" in artifact["files"]:
        found.append(Command("Ollama", f"ollama create {shlex.quote(name)} -f Modelfile"))
    return found


_PYTHON = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto", device_map="auto")"""
