"""The GGUF name of every tensor of the model, by its family."""

from __future__ import annotations

from exporter.backends.gguf.file_types import ModelShape
from exporter.errors import MissingTensorError, UnexpectedTensorError, UnsupportedModelError
from exporter.families import FAMILIES, find_family
from exporter.families.base import Family, number
from exporter.families.roles import HEAD, is_recomputed
from exporter.merge.model import MergedModel, MergedTensor


def family_of(model: MergedModel) -> Family:
    """The family of the model; without one there is no GGUF spelling of it."""
    family = find_family(model.config)
    if family is None:
        raise UnsupportedModelError(
            "config.json",
            found=f"model_type {model.config.get('model_type')!r}, architectures {model.config.get('architectures')}",
            expected=" or ".join(family.architecture for family in FAMILIES),
            remedy="Export to safetensors, which takes any architecture.",
        )
    if model.config.get("attention_bias") and not family.qkv_bias:
        raise UnsupportedModelError(
            "config.json: attention_bias",
            found="true",
            expected=f"false: llama.cpp has no such biases in {family.gguf_architecture}",
            remedy="Export to safetensors.",
        )
    return family


def named_tensors(model: MergedModel, family: Family) -> list[tuple[str, MergedTensor]]:
    """Pair every merged tensor with its GGUF name; refuse unless they are the ones the configuration calls for."""
    import gguf

    expected = family.expected_tensors(model.config)
    actual = {tensor.name: tensor for tensor in model.tensors if not is_recomputed(tensor.name)}
    if model.config.get("tie_word_embeddings"):
        # Some tied checkpoints store the head again; the runtime takes the embedding.
        actual.pop(HEAD, None)
    for name, shape in expected.items():
        if name not in actual or actual[name].shape != shape:
            found = f"shape {list(actual[name].shape)}" if name in actual else "no such tensor"
            raise MissingTensorError(
                name, found=found, expected=f"shape {list(shape)} by config.json", remedy="Fetch the base again."
            )
    if extra := sorted(actual.keys() - expected.keys()):
        raise UnexpectedTensorError(
            extra[0],
            found=f"a tensor that {family.architecture} does not have"
            + (f" (and {len(extra) - 1} more)" * bool(extra[1:])),
            expected="only the tensors that config.json calls for",
            remedy="Export to safetensors, which keeps every tensor.",
        )
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_architecture)
    names = gguf.get_tensor_name_map(architecture, number(model.config, "num_hidden_layers"))
    return [(names.get_name(name, try_suffixes=(".weight", ".bias")), actual[name]) for name in expected]


def model_shape(model: MergedModel, family: Family) -> ModelShape:
    """The sizes that decide the types of its tensors."""
    layers, heads = number(model.config, "num_hidden_layers"), number(model.config, "num_attention_heads")
    return ModelShape(
        layers=layers,
        gqa=heads // number(model.config, "num_key_value_heads", heads),
        tied=bool(model.config.get("tie_word_embeddings")),
        # llama.cpp calls Qwen2 models of 80 layers LLM_TYPE_70B (src/models/qwen2.cpp).
        bump_attn_v=family.gguf_architecture == "qwen2" and layers == 80,
    )
