"""A family: the tensors that a configuration calls for, and how the GGUF architecture is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.errors import UnsupportedModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A decoder-only Qwen family.

    Attributes:
        model_type: `model_type` of the configuration.
        architecture: the class in `architectures`.
        gguf_architecture: value of `general.architecture` in a GGUF file.
        qkv_bias: whether q, k and v have a bias.
        qk_norm: whether q and k are normalized per head.
    """

    model_type: str
    architecture: str
    gguf_architecture: str
    qkv_bias: bool
    qk_norm: bool

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """Elements of one attention head."""
        explicit = config.get("head_dim")
        return int(explicit) if explicit else number(config, "hidden_size") // number(config, "num_attention_heads")

    def expected_tensors(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Every tensor that the configuration calls for, by name, in model order; the head only if it is untied.

        Raises:
            UnsupportedModelError: a size is missing from the configuration.
        """
        hidden, vocabulary = number(config, "hidden_size"), number(config, "vocab_size")
        tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
        for layer in range(number(config, "num_hidden_layers")):
            for name, shape in self._layer(config).items():
                tensors[f"model.layers.{layer}.{name}"] = shape
        tensors["model.norm.weight"] = (hidden,)
        if not config.get("tie_word_embeddings"):
            tensors["lm_head.weight"] = (vocabulary, hidden)
        return tensors

    def _layer(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        hidden, inner = number(config, "hidden_size"), number(config, "intermediate_size")
        head_dim = self.head_dim(config)
        heads = number(config, "num_attention_heads")
        queries, keys = heads * head_dim, number(config, "num_key_value_heads", heads) * head_dim
        tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            tensors[f"self_attn.{name}_proj.weight"] = (rows, hidden)
            if self.qkv_bias or config.get("attention_bias"):
                tensors[f"self_attn.{name}_proj.bias"] = (rows,)
        tensors["self_attn.o_proj.weight"] = (hidden, queries)
        if config.get("attention_bias") and not self.qkv_bias:
            tensors["self_attn.o_proj.bias"] = (hidden,)
        if self.qk_norm:
            tensors["self_attn.q_norm.weight"] = (head_dim,)
            tensors["self_attn.k_norm.weight"] = (head_dim,)
        tensors["post_attention_layernorm.weight"] = (hidden,)
        tensors["mlp.gate_proj.weight"] = (inner, hidden)
        tensors["mlp.up_proj.weight"] = (inner, hidden)
        tensors["mlp.down_proj.weight"] = (hidden, inner)
        return tensors


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of the configuration.

    Raises:
        UnsupportedModelError: it is missing or not a positive integer.
    """
    value = config.get(key, default)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise UnsupportedModelError(
            f"config.json: {key}", found=repr(value), expected="a positive integer", remedy="Fetch the base again."
        )
    return value
