"""Holds the index of a model folder against its shards.

transformers and vLLM load what the index names, from the file that it names: a tensor of which it says nothing is not
loaded, whatever the shards hold.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from exporter.backends.weight_reader import named_faults
from exporter.inputs.checkpoint import INDEX_NAME, SINGLE_NAME


def index_faults(folder: Path, holders: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What the index says otherwise than the shards, in words.

    Args:
        folder: the model folder.
        holders: the shards that hold each tensor, by the tensor's name.
    """
    several = [(name, files) for name, files in holders.items() if len(files) > 1]
    yield from named_faults([f"{name} is in {' and in '.join(files)}" for name, files in several])
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    file = folder / INDEX_NAME
    if not file.is_file():
        if len(shards) > 1:
            yield f"{INDEX_NAME} is missing, and there are {len(shards)} shards"
        elif shards and shards[0] != SINGLE_NAME:
            yield f"{INDEX_NAME} is missing, and {shards[0]} is not {SINGLE_NAME}"
        return
    try:
        named = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"{INDEX_NAME} has no weight_map that can be read: {error}"
        return
    unnamed = [(name, files[0]) for name, files in holders.items() if name not in named]
    yield from named_faults([f"{INDEX_NAME} does not name {name}, which is in {shard}" for name, shard in unnamed])
    elsewhere = [(name, shard) for name, shard in named.items() if shard not in holders.get(name, ())]
    yield from named_faults(
        [f"{INDEX_NAME} says that {name} is in {shard}, which does not hold it" for name, shard in elsewhere]
    )
    yield from (f"{shard} is not named by {INDEX_NAME}" for shard in shards if shard not in named.values())


def stray_faults(stored: Iterable[str], known: Container[str]) -> Iterator[str]:
    """Tensors that are not the model's, in words.

    Args:
        stored: names of what the shards hold.
        known: names of what they may hold.
    """
    yield from named_faults([f"{name} is not a tensor of the model" for name in stored if name not in known])
