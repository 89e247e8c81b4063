"""Reads a group of entry points: how backends, runtimes and adapter methods of any package are found."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from exporter.errors import BackendError, ExporterError


def entries(group: str, error: type[ExporterError] = BackendError) -> dict[str, EntryPoint]:
    """The entry points of a group by name, in the order of their names. Imports none of them.

    Args:
        group: such as `exporter.backends`; its last word, without the s, is what errors call an entry.
        error: the class of the error that is raised.

    Raises:
        ExporterError: two packages have an entry of the same name, but not the same object.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in found and found[entry.name].value != entry.value:
            raise error(
                f"{_kind(entry)} {entry.name!r}",
                found=f"{found[entry.name].value} and {entry.value}",
                expected=f"one {_kind(entry)} of that name",
                remedy="Uninstall one of the two packages.",
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def load(entry: EntryPoint, error: type[ExporterError] = BackendError) -> Any:
    """What an entry point names, such as a class.

    Args:
        entry: one of `entries`.
        error: the class of the error that is raised.

    Raises:
        ExporterError: its module cannot be imported, or has no such name.
    """
    try:
        return entry.load()
    except Exception as raised:  # whatever another package's module does when it is imported
        raise not_loaded(entry, raised, error) from raised


def not_loaded(entry: EntryPoint, raised: Exception, error: type[ExporterError] = BackendError) -> ExporterError:
    """The error that an entry point does not load, or that its class cannot be used.

    Args:
        entry: one of `entries`.
        raised: what its module or class raised.
        error: the class of the error that is made.
    """
    return error(
        f"{_kind(entry)} {entry.name!r} ({entry.value})",
        found=f"{type(raised).__name__}: {raised}"[:200],
        expected="a module and a class that load",
        remedy="Install what the package needs, or uninstall it.",
    )


def _kind(entry: EntryPoint) -> str:
    """`backend` for an entry of the group `exporter.backends`."""
    return entry.group.rpartition(".")[2].removesuffix("s")
