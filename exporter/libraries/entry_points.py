"""Reads groups of entry points: how backends, runtimes and adapter methods of any package are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from exporter.errors import ExporterError

T = TypeVar("T")


@dataclass(frozen=True)
class EntryPointGroup:
    """A group of entry points.

    Attributes:
        name: of the group, such as `exporter.backends`.
        kind: what errors call an entry: `backend`.
        error: the class of its errors.
    """

    name: str
    kind: str
    error: type[ExporterError]

    def entries(self) -> dict[str, EntryPoint]:
        """All entries by name, in the order of their names. Imports none of them.

        Raises:
            ExporterError: two packages have an entry of the same name, but not the same object. Its class is `error`.
        """
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.name):
            if entry.name in found and found[entry.name].value != entry.value:
                raise self.error(
                    f"{self.kind} {entry.name!r}",
                    found=f"{found[entry.name].value} and {entry.value}",
                    expected=f"one {self.kind} of that name",
                    remedy="Uninstall one of the two packages.",
                )
            found[entry.name] = entry
        return dict(sorted(found.items()))

    def load(self, entry: EntryPoint, use: Callable[[Any], T]) -> T:
        """Import what an entry names, and make of it what is needed.

        Args:
            entry: one of `entries`.
            use: takes the imported object. It may raise anything, such as TypeError for an object of the wrong kind.

        Raises:
            ExporterError: the module cannot be imported, or has no such name, or `use` raised. Its class is `error`.
        """
        try:
            return use(entry.load())
        except Exception as raised:  # whatever another package's module does when it is imported
            raise self.error(
                f"{self.kind} {entry.name!r} ({entry.value})",
                found=f"{type(raised).__name__}: {raised}"[:200],
                expected="a module and a class that load",
                remedy="Install what the package needs, or uninstall it.",
            ) from raised
