"""Finds backends by the entry-point group `exporter.backends`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from exporter.backends.base import Backend
from exporter.errors import BackendError, UnknownFormatError

GROUP = "exporter.backends"


@cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise BackendError(
                f"backend {entry.name!r}",
                found=f"{found[entry.name].value} and {entry.value}",
                expected="one backend of that name",
                remedy="Uninstall one of the two packages.",
            )
        found[entry.name] = entry
    return found


def backend_names() -> tuple[str, ...]:
    """Names of all installed backends, sorted."""
    return tuple(sorted(_entries()))


def load_backend(name: str) -> Backend:
    """Load a backend by name.

    Raises:
        UnknownFormatError: no such backend; names those that exist.
    """
    if name not in _entries():
        raise UnknownFormatError(
            f"format {name!r}",
            found="no backend of that name",
            expected="one of " + ", ".join(backend_names()),
            remedy="Install the package that provides it, or choose another format.",
        )
    entry = _entries()[name]
    try:
        backend: Backend = entry.load()()
    except Exception as error:  # whatever another package's module does when it is imported
        raise BackendError(
            f"backend {name!r} ({entry.value})",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="a module and a class that load",
            remedy="Install what the package needs, or uninstall it.",
        ) from error
    return backend
