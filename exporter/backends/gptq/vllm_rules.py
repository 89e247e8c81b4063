"""What loads a GPTQ folder: what vLLM takes of it and makes one layer of, and what transformers takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from exporter.backends.gptq.options import Scheme
from exporter.errors import UnservableError
from exporter.families.roles import experts_of, fused_modules, is_expert_down, module_of, shared_inputs
from exporter.merge.model import MergedModel
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.transformers.gptq import loads_gptq
from exporter.runtimes.vllm.gptq import MARLIN_EXPERT_IN, SERVED_BITS


def served_together(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group weights by the layer that vLLM makes of them, in the order of the first of each group."""
    groups: dict[str, list[str]] = {}
    for group in shared_inputs(names):
        groups.setdefault(experts_of(group[0]) or group[0], []).extend(group)
    return [tuple(group) for group in groups.values()]


def module_patterns(group: Sequence[str]) -> list[str]:
    """Regular expressions for the modules of a group, and for what vLLM calls the layer that it makes of them."""
    if experts := experts_of(group[0]):
        return [rf"{re.escape(experts)}(?:\.\d+\.[^.]+)?"]
    modules = [module_of(name) for name in group]
    return [re.escape(module) for module in (*modules, *fused_modules(group))]


def vllm_refusals(
    model: MergedModel, schemes: Mapping[str, Scheme], scheme: Scheme, checkpoint_format: str = "gptq"
) -> list[str]:
    """Why vLLM would not load a folder, in words.

    Args:
        model: the merged model.
        schemes: how each packed matrix is quantized, by the merged tensor's name.
        scheme: what the configuration says of all of them; vLLM checks it whether or not a matrix is quantized so.
        checkpoint_format: `gptq` or `gptq_v2`.
    """
    found: dict[str, None] = {}
    for one in (scheme, *schemes.values()):
        if one.bits not in SERVED_BITS:
            found[f"{one.bits} bits"] = None
        if not one.sym:
            found["zero points (sym is false)"] = None
        # With one group for all columns their order does not matter, and vLLM passes over it.
        if one.desc_act and one.group_size != -1:
            found["desc_act"] = None
    if checkpoint_format != "gptq":
        found[f"checkpoint format {checkpoint_format}"] = None
    if _ignores_rules(model, schemes, scheme):
        found["experts with settings of their own, and of a size for which vLLM does not look at those"] = None
    return list(found)


def _ignores_rules(model: MergedModel, schemes: Mapping[str, Scheme], scheme: Scheme) -> bool:
    """Whether vLLM takes the model's settings for experts that have others.

    Where its Marlin kernel takes no experts of a size, it turns to MoeWNA16Config, which knows no `dynamic`.
    """
    for tensor in model.tensors:
        if len(tensor.shape) == 2 and experts_of(tensor.name) and schemes.get(tensor.name) != scheme:
            columns = tensor.shape[1]
            if is_expert_down(tensor.name):
                if scheme.group_size > 0 and columns % scheme.group_size:
                    return True
            elif columns % MARLIN_EXPERT_IN:
                return True
    return False


def packed_kinds(schemes: Mapping[str, Scheme]) -> frozenset[PackedWeights]:
    """Every kind of packed weights.

    Args:
        schemes: how each packed matrix is quantized, by the merged tensor's name.
    """
    return frozenset(PackedWeights("gptq", scheme.bits, bool(experts_of(name))) for name, scheme in schemes.items())


def check_servable(label: str, refusals: Sequence[str], *, force: bool) -> None:
    """Refuse what no server takes, unless it was asked for.

    Raises:
        UnservableError: no server takes it.
    """
    if refusals and not force:
        raise UnservableError(
            label,
            found="; ".join(refusals),
            expected="4 or 8 bits, sym, no desc_act: what vLLM serves",
            remedy="Choose such a type, or write it anyway for transformers with --force-unservable.",
        )


def runtimes_of(refusals: Sequence[str], packed: Collection[PackedWeights], *, mixed: bool = False) -> tuple[str, ...]:
    """What loads the result, the preferred one first.

    Args:
        refusals: why vLLM would not.
        packed: every kind of packed weights.
        mixed: whether some have settings of their own.
    """
    return ("vllm",) * (not refusals) + ("transformers",) * loads_gptq(packed, mixed=mixed)


def notes_of(refusals: Sequence[str], packed: Collection[PackedWeights], *, mixed: bool = False) -> list[str]:
    """What the reader of a plan should know of it; arguments as of `runtimes_of`."""
    notes = []
    if refusals:
        loaded = loads_gptq(packed, mixed=mixed)
        notes.append(
            f"no server takes it ({'; '.join(refusals)})"
            + (
                ": transformers loads it through optimum and gptqmodel"
                if loaded
                else ", and transformers does not load it"
            )
        )
    if mixed:
        notes.append("modules differ in their settings, which transformers does not support for GPTQ")
    if any(one.experts for one in packed):
        notes.append(
            "experts are packed one by one: transformers has those of a layer in one tensor, and does not load them"
        )
    return notes
