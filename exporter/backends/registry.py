"""Finds backends by the entry-point group `exporter.backends`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from exporter.backends.base import Backend
from exporter.errors import BackendError, UnknownFormatError
from exporter.libraries.entry_points import EntryPointGroup

GROUP = EntryPointGroup("exporter.backends", "backend", BackendError)


@cache
def _entries() -> dict[str, EntryPoint]:
    return GROUP.entries()


def backend_names() -> tuple[str, ...]:
    """Names of all installed backends, sorted."""
    return tuple(_entries())


def load_backend(name: str) -> Backend:
    """Load a backend by name.

    Raises:
        UnknownFormatError: no such backend; names those that exist.
        BackendError: it does not load, or is not a `Backend`.
    """
    if name not in _entries():
        raise UnknownFormatError(
            f"format {name!r}",
            found="no backend of that name",
            expected="one of " + ", ".join(backend_names()),
            remedy="Install the package that provides it, or choose another format.",
        )
    return GROUP.load(_entries()[name], _made)


def _made(found: type[Any]) -> Backend:
    backend = found()
    if not isinstance(backend, Backend):
        raise TypeError(f"{found.__qualname__} does not inherit from {Backend.__module__}.Backend")
    return backend


def find_backend(name: str) -> Backend | None:
    """Load a backend by name; None if no backend of that name is installed.

    Raises:
        BackendError: it does not load, or is not a `Backend`.
    """
    return load_backend(name) if name in _entries() else None
