"""Names of the files of a PEFT adapter, and refusals that every adapter method shares."""

from __future__ import annotations

from typing import Any

from exporter.errors import AdapterError, UnsupportedAdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


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
