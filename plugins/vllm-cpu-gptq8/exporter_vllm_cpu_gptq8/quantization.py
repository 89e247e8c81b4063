"""What vLLM asks: which folders this is for, and how a linear layer of 8 bits is loaded and computed."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    get_marlin_input_dtype,
    marlin_repeat_scales_on_all_ranks,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from exporter_vllm_cpu_gptq8.dense import CODES_PER_WORD, dense_weight

NAME = "cpu_gptq8"
_BITS = 8


class CpuGptq8Config(AutoGPTQConfig):
    """vLLM's own GPTQ, but for linear layers of 8 bits.

    Packed experts are left to vLLM, which refuses those of 8 bits on a CPU: it has no kernel for them.
    """

    @classmethod
    def get_name(cls) -> str:
        """What `--quantization` calls it."""
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Whether a folder is loaded by this; vLLM asks before it asks its own methods.

        Args:
            hf_quant_cfg: the folder's `quantization_config`.
            user_quant: what `--quantization` says, or None: another method than one of GPTQ's is left alone.
            hf_config: the folder's whole configuration.

        Returns:
            This method's name, or None where the folder is none of GPTQ or has no layer of 8 bits.
        """
        if not _has_eight_bits(hf_quant_cfg):
            return None
        if user_quant == NAME:
            user_quant = None
        found: str | None = super().override_quantization_method(hf_quant_cfg, user_quant, hf_config)
        return found

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is loaded and computed, by the rules for its name; None where it is not quantized."""
        if isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        method = get_linear_quant_method(self, layer, prefix, _linear_method)
        if isinstance(method, AutoGPTQLinearMethod):
            # As AutoGPTQConfig does.
            method.input_dtype = get_marlin_input_dtype(prefix)
        return method


def _has_eight_bits(config: dict[str, Any]) -> bool:
    rules = (config.get("dynamic") or {}).values()
    return any(one.get("bits") == _BITS for one in (config, *rules) if isinstance(one, dict))


def _linear_method(config: AutoGPTQConfig) -> LinearMethodBase:
    """The method of one layer, by a configuration that holds for it alone."""
    return CpuGptq8LinearMethod(config) if config.weight_bits == _BITS else AutoGPTQLinearMethod(config)


@register_weight_loader_v2_supported_method
class CpuGptq8LinearMethod(LinearMethodBase):
    """A linear layer of 8 bits: unpacked to 16 bits when it is loaded, and then computed as any layer of 16 bits.

    Args:
        config: vLLM's configuration for this layer.
    """

    def __init__(self, config: AutoGPTQConfig) -> None:
        self._group_size = config.group_size
        self._dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that the file's tensors are read into: those of AutoGPTQLinearMethod, and cut like them.

        Raises:
            ValueError: a process would hold less than whole words or groups.
        """
        del output_size
        outputs = sum(output_partition_sizes)
        group_size = input_size if self._group_size == -1 else self._group_size
        # One scale for all inputs is repeated in every process that has some of them.
        repeated = marlin_repeat_scales_on_all_ranks(self._group_size, input_size != input_size_per_partition)
        held = input_size if repeated else input_size_per_partition
        if input_size_per_partition % CODES_PER_WORD or outputs % CODES_PER_WORD or held % group_size:
            raise ValueError(
                f"{input_size_per_partition} inputs and {outputs} outputs are no whole words of {CODES_PER_WORD} codes "
                f"and groups of {group_size} inputs: choose a smaller --tensor-parallel-size"
            )
        loader = extra_weight_attrs["weight_loader"]
        groups = held // group_size
        words = torch.empty(input_size_per_partition // CODES_PER_WORD, outputs, dtype=torch.int32)
        scales = torch.empty(groups, outputs, dtype=params_dtype)
        zeros = torch.empty(groups, outputs // CODES_PER_WORD, dtype=torch.int32)
        packed: dict[str, Any] = {"packed_factor": CODES_PER_WORD, "weight_loader": loader, "output_dim": 1}
        layer.register_parameter("qweight", PackedvLLMParameter(data=words, input_dim=0, packed_dim=0, **packed))
        scaled: dict[str, Any] = {"data": scales, "weight_loader": loader, "output_dim": 1}
        # Zero points are in the file, and say nothing where they are symmetric.
        if repeated:
            layer.register_parameter("scales", ChannelQuantScaleParameter(**scaled))
            layer.register_parameter("qzeros", PackedColumnParameter(data=zeros, packed_dim=1, **packed))
        else:
            layer.register_parameter("scales", GroupQuantScaleParameter(input_dim=0, **scaled))
            layer.register_parameter("qzeros", PackedvLLMParameter(data=zeros, input_dim=0, packed_dim=1, **packed))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put one matrix of 16 bits in the place of codes, scales and zero points."""
        weight = dense_weight(layer.get_parameter("qweight").data, layer.get_parameter("scales").data)
        for name in ("qweight", "scales", "qzeros"):
            delattr(layer, name)
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        self._dense.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As of a layer that never was quantized."""
        out: torch.Tensor = self._dense.apply(layer, x, bias)
        return out
