"""How a GGUF file spells a family, as data: its architecture, keys and tensor names.

Names and keys are llama.cpp's (gguf-py/gguf/constants.py and conversion/qwen.py of the release inside
llama-cpp-python 0.3.36); tests hold them against its converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.families.roles import Role

# Without `.weight` or `.bias`; `{layer}` stands for the number of the layer. Experts of a layer are one stack.
NAMES: Mapping[Role, str] = {
    Role.EMBEDDING: "token_embd",
    Role.HEAD: "output",
    Role.FINAL_NORM: "output_norm",
    Role.INPUT_NORM: "blk.{layer}.attn_norm",
    Role.POST_ATTENTION_NORM: "blk.{layer}.ffn_norm",
    Role.Q: "blk.{layer}.attn_q",
    Role.K: "blk.{layer}.attn_k",
    Role.V: "blk.{layer}.attn_v",
    Role.O: "blk.{layer}.attn_output",
    Role.Q_NORM: "blk.{layer}.attn_q_norm",
    Role.K_NORM: "blk.{layer}.attn_k_norm",
    Role.GATE: "blk.{layer}.ffn_gate",
    Role.UP: "blk.{layer}.ffn_up",
    Role.DOWN: "blk.{layer}.ffn_down",
    Role.ROUTER: "blk.{layer}.ffn_gate_inp",
    Role.EXPERT_GATE: "blk.{layer}.ffn_gate_exps",
    Role.EXPERT_UP: "blk.{layer}.ffn_up_exps",
    Role.EXPERT_DOWN: "blk.{layer}.ffn_down_exps",
    Role.SHARED_GATE: "blk.{layer}.ffn_gate_shexp",
    Role.SHARED_UP: "blk.{layer}.ffn_up_shexp",
    Role.SHARED_DOWN: "blk.{layer}.ffn_down_shexp",
    Role.SHARED_EXPERT_GATE: "blk.{layer}.ffn_gate_inp_shexp",
}


@dataclass(frozen=True)
class Fixed:
    """A setting of the configuration that llama.cpp's code for an architecture does not look at.

    Attributes:
        key: of the configuration.
        value: what llama.cpp computes as if it were.
        default: what transformers takes where the configuration says nothing.
        reason: goes on after the value in the refusal of any other.
    """

    key: str
    value: Any
    default: Any
    reason: str


@dataclass(frozen=True)
class GgufSpelling:
    """How a GGUF file spells a family.

    Attributes:
        architecture: value of `general.architecture`.
        keys: keys of its own under the architecture, in the converter's order, each with a size of the family by name.
        fixed: settings that llama.cpp does not look at.
        names: names of tensors that are other than `NAMES`.
        large_layers: number of layers of the size for which llama.cpp stores attn_v in more bits (LLM_TYPE_70B in
            src/models); None if there is no such size.
    """

    architecture: str
    keys: tuple[tuple[str, str], ...] = ()
    fixed: tuple[Fixed, ...] = ()
    names: Mapping[Role, str] | None = None
    large_layers: int | None = None

    def name(self, role: Role, layer: int | None, end: str) -> str:
        """The name of a tensor.

        Args:
            role: what it is for.
            layer: number of its layer; None outside.
            end: `.weight` or `.bias`.
        """
        pattern = (self.names or {}).get(role) or NAMES[role]
        return pattern.format(layer=layer) + end
