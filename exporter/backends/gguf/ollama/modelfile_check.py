"""Holds the Modelfile beside a GGUF file against the one that the model calls for.

What Ollama runs is the template, the stop texts and the parameters of this file, whatever the GGUF file says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from exporter.backends.gguf.metadata.tokenizer_keys_check import shown
from exporter.backends.gguf.ollama.modelfile import MODELFILE, modelfile
from exporter.merge.model import MergedModel

# An instruction and its value: up to the quotes that end it, or to the line's end (docs.ollama.com/modelfile).
_INSTRUCTION = re.compile(r'^[ \t]*(\w+)[ \t]+(?:"""(.*?)"""|([^\n]*?))[ \t]*$', re.MULTILINE | re.DOTALL)


def modelfile_faults(file: Path, quant: str, model: MergedModel) -> Iterator[str]:
    """What a Modelfile says otherwise, in words; nothing where there is none, which Ollama can do without.

    Args:
        file: the GGUF file that it is of.
        quant: name of its file type; each of several files in a folder has a Modelfile of its own.
        model: the merged model.
    """
    beside = next(
        (one for name in (f"{MODELFILE}.{quant}", MODELFILE) if (one := file.with_name(name)).is_file()), None
    )
    if beside is None:
        return
    found = _instructions(beside.read_text(encoding="utf-8", errors="replace"))
    wanted = _instructions(modelfile(model).content(file.name).decode())
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            there, right = (
                (" and ".join(map(shown, one)) or "missing") for one in (found.get(key, []), wanted.get(key, []))
            )
            yield f"{beside.name}: {key} is {there} and should be {right}"


def _instructions(text: str) -> dict[str, list[str]]:
    """Values by instruction, of parameters by name; comments are left out."""
    values: dict[str, list[str]] = {}
    for match in _INSTRUCTION.finditer(text):
        key, value = match[1].upper(), match[2] if match[2] is not None else match[3]
        if key == "PARAMETER":
            name, _, value = value.partition(" ")
            key = f"PARAMETER {name}"
        values.setdefault(key, []).append(value)
    return values
