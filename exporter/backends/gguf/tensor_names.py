"""The tensors of a GGUF file: their names, and the merged tensors that they are made from, by the model's family."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.backends.gguf.file_types import ModelShape
from exporter.backends.pieces import AS_IT_IS, Arrangement, Piece, stack, whole
from exporter.errors import MissingTensorError, UnexpectedTensorError, UnsupportedModelError
from exporter.families import FAMILIES, find_family
from exporter.families.base import Family, TensorSpec, number
from exporter.families.roles import HEAD, is_recomputed
from exporter.merge.model import MergedModel


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file, before its type and place are known.

    Attributes:
        name: its GGUF name.
        shape: its dimensions, outermost first.
        pieces: what it is made from.
        arrangement: how its values come from those of the merged rows.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    arrangement: Arrangement = AS_IT_IS


def family_of(model: MergedModel) -> Family:
    """The family of the model, without which there is no GGUF spelling of it.

    Raises:
        UnsupportedModelError: it is of no family that is known here, or llama.cpp computes something else than its
            configuration says.
    """
    family = find_family(model.config)
    if family is None:
        raise UnsupportedModelError(
            "config.json",
            found=f"model_type {model.config.get('model_type')!r}, architectures {model.config.get('architectures')}",
            expected=" or ".join(family.architecture for family in FAMILIES),
            remedy="Export to safetensors, which takes any architecture.",
        )
    config = family.text(model.config)
    for fixed in family.gguf.fixed:
        found = config.get(fixed.key)
        found = fixed.default if found is None else found
        if found != fixed.value:
            raise UnsupportedModelError(
                f"config.json: {fixed.key}", found=_shown(found), expected=f"{_shown(fixed.value)}: {fixed.reason}",
                remedy="Export to safetensors.",
            )  # fmt: skip
    return family


def _shown(value: object) -> str:
    """A value as JSON has it, for what occurs here."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def named_tensors(model: MergedModel, family: Family) -> list[GgufTensor]:
    """The file's tensors in model order; refuse unless the merged ones are those that the configuration calls for.

    Raises:
        MissingTensorError, UnexpectedTensorError: tensors and configuration disagree.
    """
    layout = list(family.layout(model.config))
    _check(model, family, layout)
    groups: dict[str, list[TensorSpec]] = {}
    for spec in layout:
        end = f".{spec.name.rpartition('.')[2]}"
        groups.setdefault(family.gguf.name(spec.role, spec.layer, end), []).append(spec)
    return [_tensor(name, group) for name, group in groups.items()]


def _tensor(name: str, group: list[TensorSpec]) -> GgufTensor:
    """One tensor, or the experts of a layer as a stack: [experts, out_features, in_features]."""
    first = group[0]
    if first.expert is None:
        return GgufTensor(name, first.shape, whole(first.name))
    return GgufTensor(name, (len(group), *first.shape), stack((spec.name for spec in group), first.shape[0]))


def _check(model: MergedModel, family: Family, layout: list[TensorSpec]) -> None:
    actual = {tensor.name: tensor for tensor in model.tensors if not is_recomputed(tensor.name)}
    if model.config.get("tie_word_embeddings"):
        # Some tied checkpoints store the head again; the runtime takes the embedding.
        actual.pop(HEAD, None)
    for spec in layout:
        stored = actual.pop(spec.name, None)
        if stored is None or stored.shape != spec.shape:
            found = f"shape {list(stored.shape)}" if stored else "no such tensor"
            raise MissingTensorError(
                spec.name,
                found=found,
                expected=f"shape {list(spec.shape)} by config.json",
                remedy="Fetch the base again.",
            )
    if extra := sorted(actual):
        raise UnexpectedTensorError(
            extra[0],
            found=f"a tensor that {family.architecture} does not have"
            + (f" (and {len(extra) - 1} more)" * bool(extra[1:])),
            expected="only the tensors that config.json calls for",
            remedy="Export to safetensors, which keeps every tensor.",
        )


def model_shape(model: MergedModel, family: Family) -> ModelShape:
    """The sizes that decide the types of its tensors."""
    config = family.text(model.config)
    layers, heads = number(config, "num_hidden_layers"), number(config, "num_attention_heads")
    return ModelShape(
        layers=layers,
        gqa=heads // number(config, "num_key_value_heads", heads),
        tied=bool(model.config.get("tie_word_embeddings")),
        bump_attn_v=layers == family.gguf.large_layers,
        experts=family.size(config, family.experts) if family.experts else 0,
    )
