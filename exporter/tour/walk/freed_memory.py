"""Single rows of merged tensors, and memory that goes back to the system."""

from __future__ import annotations

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc use freed activations again within a layer.

    By default it gives memory at the top of its heap back as soon as tens of megabytes of it are free. Each activation
    is then faulted in and zeroed anew, a quarter of the time of a small model's layer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def release_free_memory() -> None:
    """Give what was freed back to the system: between two layers nothing of it is needed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
