"""The GPTQ weights that vLLM has kernels for."""

from __future__ import annotations

from collections.abc import Collection

from exporter.runtimes.artifact_facts import PackedWeights

# What vLLM 0.32 has kernels for (TYPE_MAP in model_executor/layers/quantization/auto_gptq.py); it refuses desc_act.
SERVED_BITS = (4, 8)
# What its Marlin kernel takes without padding (GPTQ_MARLIN_MIN_THREAD_K and _N in utils/marlin_utils.py).
MARLIN_IN, MARLIN_OUT = 128, 64
# Columns of an expert that its Marlin kernel takes (check_moe_marlin_supports_config in the same file).
MARLIN_EXPERT_IN = 128


def on_cpu(packed: Collection[PackedWeights]) -> str:
    """How a note that vLLM serves a folder goes on about its build for processors, which has a kernel for 4 bits only.

    Args:
        packed: every kind of packed weights in the folder.
    """
    experts = [one.bits for one in packed if one.experts]
    if 8 in experts:
        return "; not on the CPU, where it has no kernel for experts of 8 bits"
    amx = ", and experts on processors with AMX" if experts else ""
    if not any(one.bits == 8 for one in packed):
        return f", on the CPU too{amx}"
    return f", on the CPU with our plugin exporter-vllm-cpu-gptq8 alone, which unpacks 8 bits to 16 when loading{amx}"
