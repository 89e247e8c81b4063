"""The GPTQ weights that transformers loads."""

from __future__ import annotations

from collections.abc import Collection

from exporter.runtimes.artifact_facts import PackedWeights


def loads_gptq(packed: Collection[PackedWeights], *, mixed: bool) -> bool:
    """Whether transformers 5 loads a folder of GPTQ weights.

    It loads them through optimum, which does not look at `dynamic` and replaces linear layers only. The experts of a
    layer are one tensor in transformers 5, so packed ones fit nowhere.

    Args:
        packed: every kind of packed weights in the folder.
        mixed: whether some modules have settings of their own.
    """
    return not mixed and not any(one.experts for one in packed)
