"""Imports that keep one core busy for seconds, while the others have something else to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.merge.model import MergedModel


@contextmanager
def walk_imported(model: MergedModel) -> Iterator[None]:
    """What a walk through the model imports is imported beside what is done here.

    Args:
        model: says what its code is, and whether it has adapters.
    """
    # Both threads need it, and it is safe to import once.
    import torch  # noqa: F401

    thread = Thread(target=_import_walk, args=(model,), name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _import_walk(model: MergedModel) -> None:
    # What fails here fails again in the walk, which says what is wrong.
    with suppress(Exception):
        from exporter.tour.walk.skeleton import import_code

        import_code(model)
