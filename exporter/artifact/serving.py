"""Commands that serve what is in an artifact folder, from inside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="auto")
chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
print(tokenizer.decode(model.generate(**chat, max_new_tokens=200)[0, chat["input_ids"].shape[1] :]))"""


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
            model = _ollama_name(name, artifact["quant"])
            commands.append(("ollama", f"ollama create {model} -f {shlex.quote(modelfile)}\nollama run {model}"))
    if "vllm" in runtimes:
        commands.append(("vllm", f"vllm serve {entry} --served-model-name {shlex.quote(name)}"))
    if "transformers" in runtimes:
        commands.append(("transformers", _TRANSFORMERS))
    return commands


def _ollama_name(name: str, quant: str) -> str:
    """`name:tag`, of the letters that Ollama takes (types/model/name.go)."""
    plain = [re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("-.") for part in (name, quant)]
    return f"{plain[0] or 'model'}:{plain[1] or 'latest'}"
