"""Bases and adapters beside the ones given, which faulty artifacts are made from or held against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """What an export is made from.

    Attributes:
        base: its folder.
        adapters: their folders.
    """

    base: Path
    adapters: tuple[Path, ...]


def inputs_of(sound: Inputs, names: Collection[str], work: Path) -> dict[str, Inputs]:
    """The inputs that faults call for, by their names there; `sound` is always among them.

    Args:
        sound: the ones that were given.
        names: of those that are wanted.
        work: where they are made.
    """
    makers: Mapping[str, Callable[[], Inputs]] = {
        "left out": lambda: Inputs(sound.base, ()),
        "twice": lambda: Inputs(sound.base, (*sound.adapters, *_copies(sound, work / "twice"))),
        "other scale": lambda: Inputs(sound.base, _rescaled(sound, work / "other-scale")),
        "another": lambda: Inputs(sound.base, _others(sound, work / "another")),
        "tied": lambda: _with_head(sound, work / "tied", tied=True),
        "untied": lambda: _with_head(sound, work / "untied", tied=False),
        "head adapter": lambda: Inputs(sound.base, (*sound.adapters, _head_adapter(sound, work / "head-adapter"))),
    }
    return {"sound": sound} | {name: make() for name, make in makers.items() if name in names}


def _copies(sound: Inputs, folder: Path) -> tuple[Path, ...]:
    return tuple(Path(shutil.copytree(adapter, folder / str(number))) for number, adapter in enumerate(sound.adapters))


def _rescaled(sound: Inputs, folder: Path) -> tuple[Path, ...]:
    """Adapters whose scale is alpha / sqrt(r) where it was alpha / r, or the other way round."""
    copies = _copies(sound, folder)
    for adapter in copies:
        file = adapter / "adapter_config.json"
        config = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(config | {"use_rslora": not config.get("use_rslora")}), encoding="utf-8")
    return copies


def _others(sound: Inputs, folder: Path) -> tuple[Path, ...]:
    """Adapters of the same shapes and sizes that change other rows."""
    copies = _copies(sound, folder)
    for adapter in copies:
        _edit(
            adapter / "adapter_model.safetensors",
            lambda tensors: {name: t.roll(1, 0) if "lora_B" in name else t for name, t in tensors.items()},
        )
    return copies


def _edit(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _with_head(sound: Inputs, folder: Path, *, tied: bool) -> Inputs:
    """The base with a head of its own, or without; as it is if it is so already."""
    config = json.loads((sound.base / "config.json").read_text("utf-8"))
    if bool(config.get("tie_word_embeddings")) == tied:
        return sound
    folder.mkdir()
    tensors: Tensors = {}
    for file in sorted(sound.base.iterdir()):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.is_file() and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
    if tied:
        tensors.pop(HEAD, None)
    else:
        embedding = tensors[EMBEDDING]
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
        tensors[HEAD] = (embedding.float() + 0.3 * embedding.float().std() * noise).to(embedding.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}, indent=2), encoding="utf-8")
    return Inputs(folder, sound.adapters)


def _head_adapter(sound: Inputs, folder: Path) -> Path:
    """An adapter of rank 4 on the head alone, its change a tenth of the embedding in size."""
    embedding = _embedding(sound.base)
    rows, columns = embedding.shape
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, columns, generator=generator) / columns**0.5
    up = torch.randn(rows, 4, generator=generator)
    up *= 0.1 * embedding.float().norm() / (up @ down).norm()
    folder.mkdir()
    prefix = "base_model.model.lm_head"
    save_file(
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _embedding(base: Path) -> torch.Tensor:
    from safetensors import safe_open

    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if EMBEDDING in opened.keys():  # noqa: SIM118 (not a mapping)
                found: torch.Tensor = opened.get_tensor(EMBEDDING)
                return found
    raise ValueError(f"{base} has no {EMBEDDING}")
