"""The merged model as data: which tensors it has, in model order, and what each is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from exporter.adapters.adapter import Adapter
from exporter.adapters.base import Update
from exporter.adapters.binding import bind
from exporter.adapters.values import check_copies, check_values, equal_values
from exporter.errors import MissingTensorError, QuantizedBaseError, UnsupportedAdapterError, UnsupportedModelError
from exporter.families import find_family
from exporter.families.roles import EMBEDDING, HEAD, model_order
from exporter.inputs.checkpoint import FLOAT_DTYPES, Checkpoint, StoredTensor
from exporter.inputs.tokenizer import TokenizerFiles

# Dtypes that only a quantized checkpoint stores weights in.
QUANTIZED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I32", "U32"})


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model.

    Attributes:
        name: its name, which is the base's.
        source: the base tensor that it starts from.
        updates: what the adapters do to it, in order; empty if the base's values are kept.
    """

    name: str
    source: StoredTensor
    updates: tuple[Update, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions, outermost first."""
        return self.source.shape

    @property
    def needs_base(self) -> bool:
        """Whether an update uses the base's own rows beside those that it changes."""
        return any(update.needs_base for update in self.updates)

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class MergedModel:
    """Base + adapters, checked, as a list of tensors in model order.

    Attributes:
        base: the base checkpoint.
        adapters: the adapters, in the order in which they are added.
        tensors: the tensors in model order: embedding, layers by number, norm, head.
        config: the configuration of the merged model (the base's, but untied where head and embedding diverge).
        untied: True if the adapter made head and embedding diverge in a model that ties them.
        tokenizer: tokenizer and chat template files: the adapter's where it carries its own, else the base's.
        name: name of the merged model, for file names and metadata.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    tensors: tuple[MergedTensor, ...]
    config: Mapping[str, Any]
    untied: bool
    tokenizer: TokenizerFiles
    name: str

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def updated(self) -> int:
        """Number of tensors that an adapter changes."""
        return sum(1 for tensor in self.tensors if tensor.updates)

    @property
    def head(self) -> MergedTensor | None:
        """The tensor that turns final hidden states into logits: the embedding where they are tied."""
        tensors = {tensor.name: tensor for tensor in self.tensors}
        if not self.config.get("tie_word_embeddings") and HEAD in tensors:
            return tensors[HEAD]
        return tensors.get(EMBEDDING)


def plan_merge(base: Checkpoint, adapters: tuple[Adapter, ...], name: str) -> MergedModel:
    """Check base and adapters against each other and list the merged model's tensors.

    Reads headers, the adapters' own values, and nothing else of the base.

    Raises:
        QuantizedBaseError: the base is quantized.
        AdapterError and its kinds: see `exporter.adapters`.
    """
    check_not_quantized(base)
    updates: dict[str, tuple[Update, ...]] = {}
    for adapter in adapters:
        for target, update in bind(adapter, base).items():
            updates[target] = (*updates.get(target, ()), update)
        check_values(adapter)
        check_copies(adapter, base)
    _check_stacks(updates)
    _check_tensors(base)
    untied = _stores_another_head(base) or _diverges(base, updates)
    tensors = [MergedTensor(tensor.name, tensor, updates.get(tensor.name, ())) for tensor in base.tensors.values()]
    config = dict(base.config)
    if untied:
        config["tie_word_embeddings"] = False
        if HEAD not in base.tensors:
            tensors.append(MergedTensor(HEAD, base.tensors[EMBEDDING], updates.get(HEAD, ())))
    tensors.sort(key=lambda tensor: model_order(tensor.name))
    tokenizer = TokenizerFiles.choose(base.folder, tuple(adapter.folder for adapter in adapters))
    return MergedModel(base, adapters, tuple(tensors), config, untied, tokenizer, name)


def _check_stacks(updates: Mapping[str, tuple[Update, ...]]) -> None:
    """Updates that say so must be alone on their tensor."""
    for target, found in updates.items():
        alone = next((update for update in found if not update.stacks), None)
        if alone is not None and len(found) > 1:
            raise UnsupportedAdapterError(
                alone.tensors[0].name,
                found=f"{len(found)} adapters that change {target}",
                expected="no other adapter on that tensor: what they make together is not defined",
                remedy="Give one of the adapters, or merge them with peft and export the merged model as --base.",
            )


def _check_tensors(base: Checkpoint) -> None:
    """In a family that is known, every tensor that the configuration calls for must be there."""
    family = find_family(base.config)
    for spec in family.layout(base.config) if family else ():
        stored = base.tensors.get(spec.name)
        if stored is None or stored.shape != spec.shape:
            raise MissingTensorError(
                spec.name,
                found=f"shape {list(stored.shape)}" if stored else "no such tensor",
                expected=f"shape {list(spec.shape)} by config.json",
                remedy="Fetch the base again.",
            )


def _stores_another_head(base: Checkpoint) -> bool:
    """Whether a base that says it is tied stores a head of its own; transformers then takes the stored one."""
    head, embedding = base.tensors.get(HEAD), base.tensors.get(EMBEDDING)
    if not base.config.get("tie_word_embeddings") or head is None or embedding is None:
        return False
    return head.shape == embedding.shape and not equal_values(head, embedding)


def _diverges(base: Checkpoint, updates: Mapping[str, tuple[Update, ...]]) -> bool:
    """Whether head and embedding of a tied model end up different: an update of one of them is not one of the other."""
    return bool(base.config.get("tie_word_embeddings")) and (HEAD in updates or EMBEDDING in updates)


def check_not_quantized(base: Checkpoint) -> None:
    """Refuse a base that is already quantized: merging into it would round the tune away.

    Raises:
        QuantizedBaseError: by the configuration or by the tensors' dtypes.
        UnsupportedModelError: a tensor is neither quantized nor a float that is read here.
    """
    quantization = base.config.get("quantization_config") or base.config.get("compression_config")
    if quantization and not isinstance(quantization, Mapping):
        raise _quantized("config.json: quantization_config", repr(quantization)[:80])
    if quantization:
        method = quantization.get("quant_method") or "quantized"
        if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
            method = "bitsandbytes"
        raise _quantized("config.json: quantization_config", f"a base quantized with {method}")
    for tensor in base.tensors.values():
        if tensor.dtype in QUANTIZED_DTYPES:
            raise _quantized(tensor.name, f"{tensor.dtype} data")
        if tensor.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                tensor.name, found=f"{tensor.dtype} data", expected=" ".join(sorted(FLOAT_DTYPES)),
                remedy="Save the base in bf16, fp16 or fp32.",
            )  # fmt: skip


def _quantized(thing: str, found: str) -> QuantizedBaseError:
    return QuantizedBaseError(
        thing,
        found=found,
        expected="float tensors (bf16, fp16 or fp32)",
        remedy="Give the 16-bit model that the quantized one was made from as --base.",
    )
