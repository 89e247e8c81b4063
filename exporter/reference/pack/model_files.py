"""The trained model without its weights, as a reference pack holds it: what its files say, and its tensors' shapes.

    model/config.json, generation_config.json, the tokenizer's files and chat templates
    model/tensors.json     dtype and shape of every tensor of the merged model, in model order

With these an artifact's tokenizer, template, end tokens and configuration are judged where neither base nor adapters
are. Files of the tokenizer are the source's own, byte for byte; `config.json` is that of the merged model.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from exporter.errors import ReferencePackError
from exporter.inputs.checkpoint import FLOAT_DTYPES, Checkpoint, StoredTensor, read_json
from exporter.inputs.tokenizer import TOKENIZER_NAMES, TokenizerFiles
from exporter.merge.model import MergedModel, MergedTensor
from exporter.plan.reference_pack import CONFIG, MODEL_FOLDER, NAMES, TENSORS


class _Tensor(BaseModel):
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]


class _Tensors(BaseModel):
    untied: bool
    tokenizer: str
    tensors: dict[str, _Tensor] = Field(min_length=1)


def packed_model(pack: Path, name: str, listed: Collection[str]) -> MergedModel:
    """The merged model of a pack, none of whose weights can be read; its files must have been checked.

    Args:
        pack: the folder.
        name: what the model is called.
        listed: names of the pack's files; what else lies there is not its.

    Raises:
        ReferencePackError: the tensors are not described as they should be, or there is a file of the model's that is
            not listed.
        CheckpointError: the configuration is no JSON object.
    """
    folder = pack / MODEL_FOLDER
    for added in NAMES:
        if (folder / added).is_file() and f"{MODEL_FOLDER}/{added}" not in listed:
            raise ReferencePackError(
                f"{MODEL_FOLDER}/{added}", found="a file that the pack does not list",
                expected="its own files alone", remedy="Remove it, or copy the pack again.",
            )  # fmt: skip
    file = folder / TENSORS
    try:
        described = _Tensors.model_validate_json(file.read_bytes())
        if unknown := {one.dtype for one in described.tensors.values()} - FLOAT_DTYPES:
            raise ValueError(f"the dtype {min(unknown)!r}")
    except (OSError, ValueError) as error:
        raise ReferencePackError(
            f"{MODEL_FOLDER}/{TENSORS}",
            found=" ".join(str(error).splitlines()[:3]),
            expected="dtype and shape of every tensor",
            remedy="Make the pack again with `exporter reference`.",
        ) from None
    # There is no file that holds them.
    nowhere = folder / "weights"
    stored = {name: StoredTensor(name, one.dtype, one.shape, nowhere, 0) for name, one in described.tensors.items()}
    files = {name: folder / name for name in sorted(TOKENIZER_NAMES) if f"{MODEL_FOLDER}/{name}" in listed}
    config = read_json(folder / CONFIG)
    return MergedModel(
        base=Checkpoint(folder, config, stored, ()),
        adapters=(),
        tensors=tuple(MergedTensor(tensor.name, tensor) for tensor in stored.values()),
        config=config,
        untied=described.untied,
        tokenizer=TokenizerFiles(files, described.tokenizer),
        name=name,
    )
