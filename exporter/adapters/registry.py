"""Finds adapter methods by the entry-point group `exporter.adapters`, and the method of an adapter by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from exporter.adapters.base import CONFIG_NAME, AdapterMethod, unsupported
from exporter.errors import AdapterError
from exporter.libraries.entry_points import EntryPointGroup

GROUP = EntryPointGroup("exporter.adapters", "adapter method", AdapterError)


@cache
def _entries() -> dict[str, EntryPoint]:
    return GROUP.entries()


def method_names() -> tuple[str, ...]:
    """Names of all installed adapter methods, sorted."""
    return tuple(_entries())


def load_method(name: str) -> AdapterMethod:
    """Load an installed adapter method by name.

    Raises:
        AdapterError: its module does not load, or it is no adapter method.
    """
    return GROUP.load(_entries()[name], _made)


def _made(method: Any) -> AdapterMethod:
    if not (isinstance(method, type) and issubclass(method, AdapterMethod)):
        raise TypeError("it is no subclass of AdapterMethod")
    return method()


def find_method(config: Mapping[str, Any]) -> AdapterMethod:
    """The method of an adapter.

    Where several have its `peft_type`, the one whose switch is on goes before the one that has none. A method that does
    not load stands in nobody's way but that of an adapter which no other method recognizes.

    Args:
        config: `adapter_config.json`.

    Raises:
        UnsupportedAdapterError: no method recognizes it.
        AdapterError: two do, or none does and a method could not be loaded.
    """
    methods: list[AdapterMethod] = []
    broken: AdapterError | None = None
    for name in method_names():
        try:
            methods.append(load_method(name))
        except AdapterError as error:
            broken = broken or error
    found = [method for method in methods if method.recognizes(config)]
    found = [method for method in found if method.switch] or found
    if len(found) > 1:
        raise AdapterError(
            CONFIG_NAME,
            found="an adapter of " + " and ".join(method.name for method in found),
            expected="one method that recognizes it",
            remedy="Uninstall one of the packages, or correct the configuration.",
        )
    if found:
        return found[0]
    if broken:
        raise broken
    known = sorted({repr(method.peft_type) for method in methods})
    raise unsupported(f"{CONFIG_NAME}: peft_type", repr(config.get("peft_type")), " or ".join(known))
