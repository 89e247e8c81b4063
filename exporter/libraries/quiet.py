"""Imports of libraries that have something to say to nobody in particular."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quietly() -> Iterator[None]:
    """While this is entered, nothing is logged below errors: libraries warn about parts of themselves when they are
    imported (torchao, which GPTQModel brings along, about kernels for other Pythons)."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def import_transformers() -> Any:
    """transformers with what it imports late, quietly."""
    with quietly():
        import transformers.models.auto
        import transformers.quantizers.auto
    return transformers
