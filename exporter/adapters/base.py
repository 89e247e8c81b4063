"""What an adapter method is: it reads a PEFT adapter and turns it into updates of the base's tensors.

An update changes rows of one base tensor in float32. Rows are the unit, since a model is merged row block by row block.
Whatever needs more than the rows of a block is read once a tensor, before the first block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.errors import AdapterError, UnsupportedAdapterError
from exporter.inputs.checkpoint import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from exporter.inputs.row_blocks import RowBlock, Workspace
    from exporter.inputs.tensor_reader import TensorReader

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Settings of peft's `PeftConfig` and of all its tuners (0.21) that say where an adapter goes and where it is from.
COMMON_SETTINGS = frozenset({
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
})  # fmt: skip


def unsupported(thing: str, found: str, expected: str) -> UnsupportedAdapterError:
    """What is part of the adapter and is not merged here."""
    return UnsupportedAdapterError(
        thing, found=found, expected=expected, remedy="Merge it with peft and export the merged model as --base."
    )


def malformed(key: str, found: Any, expected: str) -> AdapterError:
    """The error of a key of `adapter_config.json` whose value is not of the form that peft writes."""
    return AdapterError(
        f"{CONFIG_NAME}: {key}", found=repr(found)[:80], expected=expected, remedy="Save the adapter again."
    )


@dataclass(frozen=True)
class RowInputs:
    """What an update may use to change some rows.

    Attributes:
        first_row: number of the first row; an expert's number follows from it where experts are stacked.
        base: the base's own rows, before any adapter: float32, of the shape of the rows, on their device. None unless
            the update says `needs_base`.
        whole: what `Update.read_whole` returned for the tensor, on the rows' device.
        of_rows: what `Update.read_rows` returned for these rows, on their device.
        tile_rows: height of one product. A method that computes in tiles of this height, from the first row on, gives
            the same bits for any size of block.
        workspace: buffers that the thread uses again; None on CUDA, where torch keeps its own.
    """

    first_row: int
    base: torch.Tensor | None
    whole: Sequence[torch.Tensor]
    of_rows: Sequence[torch.Tensor]
    tile_rows: int
    workspace: Workspace | None = None


class Update(ABC):
    """What an adapter does to one tensor of the base.

    Instances are small: they name stored tensors and hold settings, but no weights.

    Attributes:
        module: name of the module whose `weight` it changes, for example `model.layers.0.self_attn.q_proj`.
        needs_base: whether `apply` uses the base's own rows, which other adapters may have changed by then.
        stacks: whether another adapter may change the same tensor.
    """

    module: str
    needs_base: ClassVar[bool] = False
    stacks: ClassVar[bool] = True

    @property
    @abstractmethod
    def shape(self) -> tuple[int | None, ...]:
        """Shape of the weight that it fits; None where any size does."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors of the adapter's file that it is made of. Errors name the first."""

    def read_whole(self, reader: TensorReader, source: StoredTensor) -> tuple[torch.Tensor, ...]:
        """Read what every row needs: called once a tensor, before its first block.

        Args:
            reader: reads the adapter's tensors and the base's.
            source: the base tensor. A method that needs a figure of all its rows, such as norms of columns, reads it
                here, in blocks.

        Returns:
            float32 tensors on the CPU.
        """
        return ()

    def read_rows(self, reader: TensorReader, block: RowBlock) -> tuple[torch.Tensor, ...]:
        """Read what the rows of one block need: float32 tensors on the CPU. Called from several threads."""
        return ()

    @abstractmethod
    def apply(self, rows: torch.Tensor, inputs: RowInputs) -> None:
        """Change rows in place.

        Args:
            rows: float32, shape (rows, columns), on any device. They hold what earlier adapters made of the base.
            inputs: what was read for them.
        """

    def without_effect(self, peaks: Mapping[str, float]) -> str | None:
        """Name the tensor or setting that makes the update leave its target as it was; None if there is none.

        Args:
            peaks: the largest magnitude of each of `tensors`, by name.
        """
        return None

    @property
    def elements(self) -> int:
        """Elements of its tensors: beside an unmerged layer, all of them are in memory."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def whole_bytes(self) -> int:
        """Bytes of what `read_whole` returns, at most."""
        return 4 * self.elements

    @property
    def passing_elements(self) -> int:
        """Elements that its unmerged layer takes for a while in each forward pass, beside its weights and outputs."""
        return 0

    @property
    def noise_terms(self) -> int:
        """How many float32 roundings add up, as in a random walk, in a change of one element (`merge_noise`)."""
        return 1


class AdapterMethod(ABC):
    """Reads the adapters of one method. Entry points of the group `exporter.adapters` name such classes.

    Attributes:
        name: what the method is called in manifests, for example `lora`.
        title: what it is called in messages.
        parts: what the file holds for each target, in words.
        peft_type: the `peft_type` in `adapter_config.json`.
        switch: a setting that must be true for the method, where several share their `peft_type`.
        settings: the settings beside `COMMON_SETTINGS` that are handled, or that do not change what is computed.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[str] = "tensors"
    peft_type: ClassVar[str]
    switch: ClassVar[str | None] = None
    settings: ClassVar[frozenset[str]] = frozenset()

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter with this configuration is the method's."""
        wanted = self.switch is None or config.get(self.switch) is True
        return wanted and config.get("peft_type") == self.peft_type

    def check_settings(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Refuse by name every setting that would change what the adapter computes and is not handled.

        Raises:
            UnsupportedAdapterError: such a setting is there.
        """
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise unsupported(f"{CONFIG_NAME}: task_type", repr(config["task_type"]), "'CAUSAL_LM'")
        for name, value in config.items():
            if value and name not in COMMON_SETTINGS and name not in self.settings:
                raise unsupported(
                    f"{folder.name}/{CONFIG_NAME}: {name}", str(value)[:80], "it unset: not supported yet"
                )

    @abstractmethod
    def read(
        self, header: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Update], Mapping[str, StoredTensor]]:
        """Turn the file's tensors into updates. Reads no weights.

        Args:
            header: the tensors of the file by name. Each must be used or refused by name.
            config: `adapter_config.json`, whose settings were checked.

        Returns:
            The updates by module name; and whole weights that peft saved beside them, by module name.

        Raises:
            AdapterError: tensors and configuration do not fit together, or a tensor is not supported.
        """

    def summary(self, config: Mapping[str, Any], updates: Mapping[str, Update]) -> dict[str, Any]:
        """What `export.json` says of the method: `method`, and where it has them `ranks` and `scales`."""
        return {"method": self.name}

    def attach(
        self,
        whole: nn.Module,
        name: str,
        folder: Path,
        updates: Sequence[Update],
        device: str,
        dtype: torch.dtype,
    ) -> None:
        """Put the adapter beside linear layers of a model without weights, unmerged: the reference is computed so.

        peft's own layers do it. A method that peft lacks replaces the modules itself; each must keep the layer that it
        stands for as `base_layer`, and must not use `Update.apply`: verification holds the merge against it.

        Args:
            whole: the model in transformers' own code; its parameters are on the meta device.
            name: a name for the adapter, another for each.
            folder: the adapter's folder.
            updates: the updates of the layers that it goes beside.
            device: where the adapter's weights go.
            dtype: what they are turned into.

        Raises:
            ValueError, RuntimeError, KeyError, OSError: peft cannot do it.
            RuntimeScoreError: peft did something else.
        """
        from exporter.adapters.peft_layers import inject

        inject(whole, name, folder, {update.module: update.tensors for update in updates}, device, dtype)

    def quicken(self, whole: nn.Module) -> None:  # noqa: B027
        """Make the attached layers faster, once all adapters are beside the model in float32. May do nothing."""
