"""A family is a table: the tensors of a decoder layer with their shapes, and how a GGUF file spells the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from exporter.errors import UnsupportedModelError
from exporter.families.gguf import GgufSpelling
from exporter.families.roles import EMBEDDING, HEAD, Role, parse

Shape = tuple[int, ...]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a configuration calls for.

    Attributes:
        name: its name in the checkpoint.
        shape: its dimensions, outermost first.
    """

    name: str
    shape: Shape

    @property
    def role(self) -> Role:
        """What it is for."""
        return parse(self.name).role

    @property
    def layer(self) -> int | None:
        """Number of its decoder layer; None outside of the layers."""
        return parse(self.name).layer

    @property
    def expert(self) -> int | None:
        """Number of its expert; None if it is not one expert's."""
        return parse(self.name).expert


def always(config: Config, layer: int) -> bool:
    """In every layer, whatever the configuration says."""
    del config, layer
    return True


@dataclass(frozen=True)
class Row:
    """One line of a family's table.

    Attributes:
        name: the tensor's name within a decoder layer; `{expert}` stands for each of the experts.
        sizes: its dimensions by name, outermost first; see `Family.sizes`.
        when: whether a layer has it, by the configuration and the layer's number.
    """

    name: str
    sizes: tuple[str, ...]
    when: Callable[[Config, int], bool] = always


def if_set(key: str) -> Callable[[Config, int], bool]:
    """In every layer if the configuration sets `key`."""
    return lambda config, _layer: bool(config.get(key))


NORM_BEFORE_ATTENTION = (Row("input_layernorm.weight", ("hidden",)),)
NORM_AFTER_ATTENTION = (Row("post_attention_layernorm.weight", ("hidden",)),)
_Q, _K, _V = (("self_attn.q_proj", "queries"), ("self_attn.k_proj", "keys"), ("self_attn.v_proj", "keys"))
_O = Row("self_attn.o_proj.weight", ("hidden", "queries"))
# Attention of Qwen2: q, k and v have a bias in every model.
ATTENTION_WITH_BIAS = (
    *(row for name, rows in (_Q, _K, _V)
      for row in (Row(f"{name}.weight", (rows, "hidden")), Row(f"{name}.bias", (rows,)))),
    _O,
)  # fmt: skip
# Attention of Qwen3: all four have a bias where the configuration asks for it.
ATTENTION = (
    *(row for name, rows in (_Q, _K, _V)
      for row in (Row(f"{name}.weight", (rows, "hidden")), Row(f"{name}.bias", (rows,), if_set("attention_bias")))),
    _O,
    Row("self_attn.o_proj.bias", ("hidden",), if_set("attention_bias")),
)  # fmt: skip
QK_NORM = (Row("self_attn.q_norm.weight", ("head",)), Row("self_attn.k_norm.weight", ("head",)))
MLP = (
    Row("mlp.gate_proj.weight", ("inner", "hidden")),
    Row("mlp.up_proj.weight", ("inner", "hidden")),
    Row("mlp.down_proj.weight", ("hidden", "inner")),
)


@dataclass(frozen=True)
class Family:
    """A decoder-only Qwen family.

    Attributes:
        model_type: `model_type` of the configuration.
        architecture: the class in `architectures`.
        layer: the tensors of a decoder layer, in model order.
        gguf: how a GGUF file spells the model.
        sizes: sizes of its own: name to the keys of the configuration, of which the first that is there counts, as
            transformers renamed some. Every family has `vocabulary`, `hidden`,
            `inner` (where the configuration has it), `head` (elements of an attention head), `queries` and `keys`
            (rows of their projections).
        experts: name of the size that counts the experts; None if it has none.
        text_config: the key of the configuration that holds the text model's; None if that is the whole.
        prefix: what the names of the text model's tensors begin with.
    """

    model_type: str
    architecture: str
    layer: tuple[Row, ...]
    gguf: GgufSpelling
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: str | None = None
    text_config: str | None = None
    prefix: str = "model."

    def text(self, config: Config) -> Config:
        """The text model's configuration."""
        return config if self.text_config is None else config.get(self.text_config) or {}

    def head_dim(self, config: Config) -> int:
        """Elements of one attention head."""
        explicit = config.get("head_dim")
        return int(explicit) if explicit else number(config, "hidden_size") // number(config, "num_attention_heads")

    def size(self, config: Config, name: str) -> int:
        """A size by its name in the table.

        Raises:
            UnsupportedModelError: it is missing from the configuration.
        """
        if name in ("head", "queries", "keys"):
            heads, head = number(config, "num_attention_heads"), self.head_dim(config)
            counts = {"head": 1, "queries": heads, "keys": number(config, "num_key_value_heads", heads)}
            return counts[name] * head
        keys = self.sizes.get(name) or (_SIZES[name],)
        return number(config, next((key for key in keys if config.get(key) is not None), keys[0]))

    def layout(self, config: Config) -> Iterator[TensorSpec]:
        """Every tensor that the configuration calls for, in model order; the head only if it is untied.

        Raises:
            UnsupportedModelError: a size is missing from the configuration.
        """
        text, tied = self.text(config), bool(config.get("tie_word_embeddings"))
        vocabulary = (self.size(text, "vocabulary"), self.size(text, "hidden"))
        yield TensorSpec(EMBEDDING.replace("model.", self.prefix, 1), vocabulary)
        for layer in range(number(text, "num_hidden_layers")):
            for row in self.layer:
                if row.when(text, layer):
                    yield from self._row(row, layer, text)
        yield TensorSpec(f"{self.prefix}norm.weight", (self.size(text, "hidden"),))
        if not tied:
            yield TensorSpec(HEAD, vocabulary)

    def _row(self, row: Row, layer: int, config: Config) -> Iterator[TensorSpec]:
        shape = tuple(self.size(config, name) for name in row.sizes)
        name = f"{self.prefix}layers.{layer}.{row.name}"
        if "{expert}" not in row.name or self.experts is None:
            yield TensorSpec(name, shape)
            return
        for expert in range(self.size(config, self.experts)):
            yield TensorSpec(name.replace("{expert}", str(expert)), shape)


_SIZES = {"vocabulary": "vocab_size", "hidden": "hidden_size", "inner": "intermediate_size"}


def number(config: Config, key: str, default: int | None = None) -> int:
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
