"""A PEFT adapter folder: its configuration, its tensors and their updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.adapters.base import CONFIG_NAME, WEIGHTS_NAME, AdapterMethod, Update
from exporter.adapters.registry import find_method
from exporter.errors import AdapterError, MissingFileError
from exporter.inputs.checkpoint import StoredTensor, read_header, read_json


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that has been checked in itself; `bind` checks it against a base.

    Attributes:
        folder: the folder.
        method: the method that reads it.
        config: `adapter_config.json` as read.
        updates: the updates by module name.
        copies: whole weights that peft saved beside the updates (embedding layers), by module name.
    """

    folder: Path
    method: AdapterMethod
    config: Mapping[str, Any]
    updates: Mapping[str, Update]
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were read."""
        return (self.folder / CONFIG_NAME, self.folder / WEIGHTS_NAME)

    @property
    def summary(self) -> dict[str, Any]:
        """What kind of adapter it is: the method with its own figures, number and kinds of targets."""
        return {
            **self.method.summary(self.config, self.updates),
            "targets": len(self.updates),
            "modules": sorted({module.rsplit(".", 1)[-1] for module in self.updates}),
        }

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open an adapter folder. Reads the configuration and the header, and no weights.

        Raises:
            MissingFileError, UnsupportedAdapterError, AdapterRankError, AdapterTargetError: see each.
            AdapterError: the file holds nothing of the adapter's method.
        """
        config = read_json(folder / CONFIG_NAME)
        method = find_method(config)
        method.check_settings(folder, config)
        if not (folder / WEIGHTS_NAME).is_file():
            other = "adapter_model.bin" if (folder / "adapter_model.bin").is_file() else "no weights"
            raise MissingFileError(
                str(folder), found=other, expected=WEIGHTS_NAME, remedy="Save the adapter with safe serialization."
            )
        updates, copies = method.read(read_header(folder / WEIGHTS_NAME), config)
        if not updates:
            raise AdapterError(
                WEIGHTS_NAME,
                found=f"no {method.title} tensor",
                expected=f"{method.parts} of each target",
                remedy="Save it again.",
            )
        return cls(folder, method, config, updates, copies)
