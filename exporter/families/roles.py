"""What each tensor of a model is for. Only this file reads tensor names; everything else asks for roles.

Qwen families share their names, so one table serves all of them. A weight that the table does not know, of a family
that is not known here, is `LINEAR` where its name says that it is a projection of a decoder layer, and `OTHER` else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import lru_cache


class Role(StrEnum):
    """What a tensor is for."""

    EMBEDDING = auto()
    HEAD = auto()
    FINAL_NORM = auto()
    INPUT_NORM = auto()
    POST_ATTENTION_NORM = auto()
    Q = auto()
    K = auto()
    V = auto()
    O = auto()  # noqa: E741
    Q_NORM = auto()
    K_NORM = auto()
    GATE = auto()
    UP = auto()
    DOWN = auto()
    ROUTER = auto()
    EXPERT_GATE = auto()
    EXPERT_UP = auto()
    EXPERT_DOWN = auto()
    SHARED_GATE = auto()
    SHARED_UP = auto()
    SHARED_DOWN = auto()
    SHARED_EXPERT_GATE = auto()
    LINEAR = auto()
    MTP = auto()
    RECOMPUTED = auto()
    OTHER = auto()


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Names within a decoder layer, without `.weight` or `.bias`; `{expert}` stands for a number.
_IN_LAYER: Mapping[str, Role] = {
    "input_layernorm": Role.INPUT_NORM,
    "post_attention_layernorm": Role.POST_ATTENTION_NORM,
    "self_attn.q_proj": Role.Q,
    "self_attn.k_proj": Role.K,
    "self_attn.v_proj": Role.V,
    "self_attn.o_proj": Role.O,
    "self_attn.q_norm": Role.Q_NORM,
    "self_attn.k_norm": Role.K_NORM,
    "mlp.gate_proj": Role.GATE,
    "mlp.up_proj": Role.UP,
    "mlp.down_proj": Role.DOWN,
    "mlp.gate": Role.ROUTER,
    "mlp.experts.{expert}.gate_proj": Role.EXPERT_GATE,
    "mlp.experts.{expert}.up_proj": Role.EXPERT_UP,
    "mlp.experts.{expert}.down_proj": Role.EXPERT_DOWN,
    "mlp.shared_expert.gate_proj": Role.SHARED_GATE,
    "mlp.shared_expert.up_proj": Role.SHARED_UP,
    "mlp.shared_expert.down_proj": Role.SHARED_DOWN,
    "mlp.shared_expert_gate": Role.SHARED_EXPERT_GATE,
}
_OUTSIDE: Mapping[str, Role] = {"model.norm": Role.FINAL_NORM, "lm_head": Role.HEAD}
# Matrices of a decoder layer that GPTQ packs: projections, and neither norms, routers nor gates of one row.
_PROJECTIONS = frozenset({
    Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN,
    Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN, Role.LINEAR,
})  # fmt: skip
# Ends of the names of buffers that older checkpoints carry and every runtime computes anew.
_RECOMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
# Layers that predict further tokens stand beside the decoder's (Qwen3-Next, Qwen3.5): no walk comes through them.
_MTP = "mtp."
_LAYER = re.compile(r"^(?P<prefix>.*\.layers\.(?P<layer>\d+)\.)(?P<rest>.+)$")
_EXPERT = re.compile(r"^(?P<before>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>.+)$")


@dataclass(frozen=True)
class TensorName:
    """A tensor's name, taken apart.

    Attributes:
        role: what the tensor is for.
        layer: number of its decoder layer; None outside of the layers.
        layer_prefix: beginning of the names of all tensors of that layer; empty outside.
        expert: number of its expert; None if it is not one expert's.
        experts: name of the module of all experts, such as `model.layers.0.mlp.experts`; None likewise.
    """

    role: Role
    layer: int | None = None
    layer_prefix: str = ""
    expert: int | None = None
    experts: str | None = None


@lru_cache(maxsize=1 << 17)
def parse(name: str) -> TensorName:
    """Take a tensor's name apart.

    Args:
        name: as it is in the checkpoint, such as `model.layers.0.mlp.experts.3.up_proj.weight`.
    """
    if name.endswith(_RECOMPUTED):
        return TensorName(Role.RECOMPUTED)
    in_layer = _LAYER.match(name)
    if in_layer is None:
        return TensorName(Role.MTP if name.startswith(_MTP) else _outside(name))
    prefix, layer, rest = in_layer["prefix"], int(in_layer["layer"]), in_layer["rest"]
    expert = _EXPERT.match(rest)
    module = _of_weight_or_bias(rest)
    if expert is not None:
        module = _of_weight_or_bias(f"{expert['before']}.{{expert}}.{expert['leaf']}")
    role = _IN_LAYER.get(module, Role.LINEAR if rest.endswith("_proj.weight") else Role.OTHER)
    if name.startswith(_MTP):
        role = Role.MTP
    if expert is None:
        return TensorName(role, layer, prefix)
    return TensorName(role, layer, prefix, int(expert["expert"]), f"{prefix}{expert['before']}")


def _outside(name: str) -> Role:
    if "embed_tokens" in name:
        return Role.EMBEDDING
    return _OUTSIDE.get(_of_weight_or_bias(name), Role.OTHER)


def module_of(name: str) -> str:
    """The name of the module that a weight belongs to; any other name as it is, as no module has it."""
    return name.removesuffix(".weight")


def _of_weight_or_bias(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def leaf_of(name: str) -> str | None:
    """The last part of the name of a weight's or bias's module, such as `q_proj`; None for any other tensor."""
    module = _of_weight_or_bias(name)
    return None if module == name else module.rpartition(".")[2]


def weight_of(module: str) -> str:
    """The name of a module's weight."""
    return f"{module}.weight"


def is_projection(name: str) -> bool:
    """Whether a weight is a matrix of a decoder layer that is multiplied with activations, and no router.

    Such are the weights that GPTQ packs.
    """
    return name.endswith(".weight") and parse(name).role in _PROJECTIONS


def experts_of(name: str) -> str | None:
    """vLLM's name of the layer of all experts that a weight belongs to, such as `model.layers.0.mlp.experts`.

    vLLM makes one layer of all experts, and looks up settings by this name (FusedMoE in
    model_executor/models/qwen3_moe.py). None for any other weight.
    """
    return parse(name).experts if name.endswith(".weight") else None


def layer_of(name: str) -> str:
    """The beginning of the names of all tensors of the same decoder layer; empty outside of the layers."""
    return parse(name).layer_prefix


def is_recomputed(name: str) -> bool:
    """Whether a tensor is a buffer of older checkpoints that every runtime computes anew."""
    return parse(name).role is Role.RECOMPUTED


def is_dense_down(name: str) -> bool:
    """Whether a weight is the last matrix of a dense layer: after its input, the layer has nothing more to show."""
    return parse(name).role is Role.DOWN


def is_expert_down(name: str) -> bool:
    """Whether a weight is the last matrix of one expert."""
    return parse(name).role is Role.EXPERT_DOWN


def model_order(name: str) -> tuple[int, int]:
    """Sort key: embedding first, then layers by number, then the rest, the head last."""
    parsed = parse(name)
    if parsed.role is Role.EMBEDDING:
        return (0, 0)
    if parsed.layer is not None:
        return (1, parsed.layer)
    return (3, 0) if parsed.role is Role.HEAD else (2, 0)


@dataclass(frozen=True)
class SharedInput:
    """Modules below one parent that are given the same input; vLLM fuses them into one matrix.

    Attributes:
        leaves: last parts of the modules' names.
        fused: vLLM's name of the matrix.
    """

    leaves: tuple[str, ...]
    fused: str


SHARED_INPUTS = (SharedInput(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
                 SharedInput(("gate_proj", "up_proj"), "gate_up_proj"))  # fmt: skip


def shared_inputs(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group weights by the input that their modules share, in the order of the first of each group.

    Args:
        names: names of weights, such as `model.layers.0.mlp.up_proj.weight`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = module_of(name).rpartition(".")
        kind = next((shared.leaves[0] for shared in SHARED_INPUTS if leaf in shared.leaves), leaf)
        groups.setdefault((parent, kind), []).append(name)
    return [tuple(group) for group in groups.values()]


def fused_modules(group: Sequence[str]) -> list[str]:
    """vLLM's name of the layer that it makes of a group's weights; empty if that is the only weight's own name.

    Args:
        group: names of weights that share an input, or of all experts of a layer.
    """
    if experts := experts_of(group[0]):
        return [experts]
    parent = module_of(group[0]).rpartition(".")[0]
    leaves = {module_of(name).rpartition(".")[2] for name in group}
    return [f"{parent}.{shared.fused}" for shared in SHARED_INPUTS if leaves == set(shared.leaves)]
