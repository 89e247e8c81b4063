"""GPTQ weights of 8 bits in vLLM's CPU build, which has a kernel for 4 bits alone. Written against vLLM 0.32.

A plugin of vLLM (docs/design/plugin_system.md there): it registers a quantization method that vLLM chooses by itself
for GPTQ folders with layers of 8 bits, and leaves everything else as it is.
"""

from __future__ import annotations


def register() -> None:
    """Register the method with vLLM, in whose processes this is called; does nothing where vLLM computes elsewhere."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from exporter_vllm_cpu_gptq8.quantization import NAME, CpuGptq8Config

    register_quantization_config(NAME)(CpuGptq8Config)
