"""Holds the small files of a model folder against what they were made from.

A wrong epsilon, rotary base or merge may change no more than rounding does: what can be compared is not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from exporter.inputs.tokenizer import TOKENIZER_NAMES
from exporter.merge.model import MergedModel
from exporter.tokens.end_tokens import GENERATION_CONFIG, generation_document

CONFIG = "config.json"
# What a folder says of its own files, and what no runtime reads.
_OWN = frozenset({"dtype", "torch_dtype", "quantization_config"})
UNREAD = ("_name_or_path", "_model_name")
# Differences of one file that are named, and characters of a value that are shown.
_NAMED, _SHOWN = 3, 60
_MISSING = object()


def document_faults(model: MergedModel, folder: Path) -> tuple[str, ...]:
    """What the configuration, generation settings and tokenizer of a folder say otherwise than the merged model's.

    Args:
        model: the merged model.
        folder: the model folder.
    """
    config = {key: value for key, value in model.config.items() if not key.startswith(UNREAD) and key not in _OWN}
    faults = list(_json_faults(folder / CONFIG, config))
    source = model.base.folder / GENERATION_CONFIG
    generation = generation_document(model) or (_read(source) if source.is_file() else None)
    if generation is not None:
        faults += _json_faults(folder / GENERATION_CONFIG, generation)
    elif (folder / GENERATION_CONFIG).exists():
        faults.append(f"{GENERATION_CONFIG} is not one of the model's files")
    for name in TOKENIZER_NAMES:
        faults += _file_faults(folder / name, model.tokenizer.files.get(name))
    return tuple(faults)


def _file_faults(file: Path, source: Path | None) -> Iterator[str]:
    if source is None:
        if file.exists():
            yield f"{file.name} is not one of the model's files"
    elif not file.is_file():
        yield f"{file.name} is missing"
    elif file.read_bytes() != source.read_bytes():
        if file.suffix == ".json":
            yield from _json_faults(file, _read(source))
        else:
            yield f"{file.name} is not the source's"


def _json_faults(file: Path, wanted: Any) -> Iterator[str]:
    if not file.is_file():
        yield f"{file.name} is missing"
        return
    try:
        found = _read(file)
    except ValueError as error:
        yield f"{file.name} is not JSON: {error}"
        return
    if file.name == CONFIG and isinstance(found, dict):
        found = {key: value for key, value in found.items() if not key.startswith(UNREAD) and key not in _OWN}
    for difference in islice(_differences(found, wanted, ""), _NAMED):
        yield f"{file.name}: {difference}"


def _differences(found: Any, wanted: Any, path: str) -> Iterator[str]:
    """What differs, innermost, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**wanted, **found}:
            place = f"{path}.{key}" if path else str(key)
            yield from _differences(found.get(key, _MISSING), wanted.get(key, _MISSING), place)
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif found != wanted:
        yield f"{path} is {_shown(found)} and should be {_shown(wanted)}"


def _shown(value: Any) -> str:
    text = "missing" if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
