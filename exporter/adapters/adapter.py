"""A PEFT adapter folder: its configuration, its tensors and their updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.adapters.base import CONFIG_NAME, WEIGHTS_NAME
from exporter.adapters.lora import LowRankUpdate, check_settings, lora_update, sort_tensors
from exporter.errors import AdapterError, MissingFileError
from exporter.inputs.checkpoint import StoredTensor, read_header, read_json


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that has been checked in itself; `bind` checks it against a base.

    Attributes:
        folder: the folder.
        config: `adapter_config.json` as read.
        updates: the updates by module name.
        copies: whole weights that peft saved beside the updates (embedding layers), by module name.
    """

    folder: Path
    config: Mapping[str, Any]
    updates: Mapping[str, LowRankUpdate]
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were read."""
        return (self.folder / CONFIG_NAME, self.folder / WEIGHTS_NAME)

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open an adapter folder. Reads the configuration and the header, and no weights.

        Raises:
            MissingFileError, UnsupportedAdapterError, AdapterRankError, AdapterTargetError: see each.
        """
        config = read_json(folder / CONFIG_NAME)
        check_settings(folder, config)
        if not (folder / WEIGHTS_NAME).is_file():
            other = "adapter_model.bin" if (folder / "adapter_model.bin").is_file() else "no weights"
            raise MissingFileError(
                str(folder), found=other, expected=WEIGHTS_NAME, remedy="Save the adapter with safe serialization."
            )
        pairs, copies = sort_tensors(read_header(folder / WEIGHTS_NAME))
        updates = {module: lora_update(module, parts, config) for module, parts in pairs.items()}
        if not updates:
            raise AdapterError(
                WEIGHTS_NAME,
                found="no LoRA tensor",
                expected="lora_A and lora_B of each target",
                remedy="Save it again.",
            )
        return cls(folder, config, updates, copies)
