"""DoRA on linear layers: `W' = m / |W + scale * B @ A| * (W + scale * B @ A)`, with the norm of each output row.

The formula is equation 5 of "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al. 2024,
https://arxiv.org/abs/2402.09353), computed in the order of peft's merge (tuners/lora/variants.py, `DoraLinearVariant`).
Whole rows suffice for it, and row blocks are whole rows. On an embedding the norms are those of columns: refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.adapters.base import RowInputs, Update, unsupported
from exporter.adapters.lora import LoraMethod, LowRankUpdate, lora_update
from exporter.errors import AdapterError, AdapterShapeError
from exporter.inputs.checkpoint import FLOAT_DTYPES, StoredTensor

if TYPE_CHECKING:
    import torch

    from exporter.inputs.tensor_reader import TensorReader

_MAGNITUDE_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")


@dataclass(frozen=True)
class DoraUpdate(LowRankUpdate):
    """A low-rank update whose rows are then scaled to a length of their own.

    Attributes:
        magnitude: length of each row, float tensor of shape (out_features,).
    """

    magnitude: StoredTensor
    # The norm is that of the base and this update alone: peft's forward and its merge differ with another adapter.
    stacks: ClassVar[bool] = False

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """See `Update`: A, B, then the magnitude."""
        return (self.a, self.b, self.magnitude)

    def read_whole(self, reader: TensorReader, source: StoredTensor) -> tuple[torch.Tensor, ...]:
        """See `Update`: A, shape (rank, in_features), and the magnitude, shape (out_features,)."""
        from exporter.inputs.row_blocks import read_tensor

        return (*super().read_whole(reader, source), read_tensor(reader, self.magnitude))

    def apply(self, rows: torch.Tensor, inputs: RowInputs) -> None:
        """See `Update`: adds the product, then scales the rows, tile by tile."""
        import torch

        super().apply(rows, inputs)
        lengths = inputs.whole[1][inputs.first_row : inputs.first_row + rows.shape[0]]
        for first in range(0, rows.shape[0], inputs.tile_rows):
            tile, wanted = (part[first : first + inputs.tile_rows] for part in (rows, lengths))
            tile.mul_((wanted / torch.linalg.norm(tile, dim=1)).view(-1, 1))

    @property
    def whole_bytes(self) -> int:
        """See `Update`."""
        return super().whole_bytes + 4 * self.shape[0]

    @property
    def passing_elements(self) -> int:
        """See `Update`: peft multiplies A and B with an identity, and adds the scaled product to the weight."""
        rows, columns = self.shape
        return columns * max(columns + rows, 3 * rows)

    @property
    def noise_terms(self) -> int:
        """See `Update`: with the roundings of the norm, which were up to 2.4 * 2**-22 apart over 27,648 columns."""
        return super().noise_terms + 4 + self.shape[1] // 1024


class DoraMethod(LoraMethod):
    """LoRA whose configuration says `use_dora`."""

    name = "dora"
    title = "DoRA"
    parts = "lora_A, lora_B and lora_magnitude_vector"
    switch = "use_dora"
    settings: ClassVar[frozenset[str]] = LoraMethod.settings | {"use_dora"}

    def part_of(self, name: str) -> tuple[str, str] | None:
        """See `LoraMethod`: with the magnitude."""
        match = _MAGNITUDE_KEY.match(name)
        return (match["module"], "magnitude") if match else super().part_of(name)

    def update(self, module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Update:
        """See `LoraMethod`.

        Raises:
            AdapterShapeError: the magnitude does not have one number for each row of B.
            UnsupportedAdapterError: the module is an embedding.
        """
        low_rank = lora_update(module, {key: one for key, one in parts.items() if key != "magnitude"}, config)
        magnitude = parts.get("magnitude")
        if magnitude is None:
            raise AdapterError(
                module,
                found="lora_A and lora_B",
                expected=f"{self.parts}, since adapter_config.json says use_dora",
                remedy="The adapter file is incomplete: save it again.",
            )
        if low_rank.transposed:
            raise unsupported(magnitude.name, "DoRA on an embedding", "DoRA on linear layers alone")
        if magnitude.dtype not in FLOAT_DTYPES or magnitude.shape != low_rank.b.shape[:1]:
            raise AdapterShapeError(
                magnitude.name,
                found=f"{magnitude.dtype} {list(magnitude.shape)}",
                expected=f"floats of shape {list(low_rank.b.shape[:1])}, one for each row of lora_B",
                remedy="Tensors are not from one training run: save the adapter again.",
            )
        return DoraUpdate(**vars(low_rank), magnitude=magnitude)

    def summary(self, config: Mapping[str, Any], updates: Mapping[str, Update]) -> dict[str, Any]:
        """See `AdapterMethod`: DoRA by its own name, whatever the scale is computed by."""
        return super().summary(config, updates) | {"method": self.name}
