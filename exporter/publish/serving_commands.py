"""Commands that serve what is in an artifact folder, from inside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from exporter.runtimes.llamacpp.runtime import ollama_name
from exporter.runtimes.transformers.runtime import TRANSFORMERS_CODE


def serving_commands(manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What serves an artifact, the preferred runtime first: its name, and the command or Python code.

    Args:
        manifest: the folder's `export.json`.
        artifact: one of its `artifacts`.
    """
    entry, name, runtimes = artifact["entry"], str(manifest["name"]), artifact["runtimes"]
    # A name that begins with a dash is no option.
    entry = shlex.quote(f"./{entry}" if entry.startswith("-") else entry)
    commands = []
    if "llamacpp" in runtimes:
        commands += [("llama-server", f"llama-server -m {entry}"), ("llama-cli", f"llama-cli -m {entry}")]
        modelfile = next((file for file in artifact["files"] if file.partition(".")[0] == "Modelfile"), None)
        if modelfile is not None:
            model = ollama_name(name, artifact["quant"])
            commands.append(("ollama", f"ollama create {model} -f {shlex.quote(modelfile)}\nollama run {model}"))
    if "vllm" in runtimes:
        commands.append(("vllm", f"vllm serve {entry} --served-model-name {shlex.quote(name)}"))
    if "transformers" in runtimes:
        commands.append(("transformers", TRANSFORMERS_CODE))
    return commands
