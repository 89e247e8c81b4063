"""Checks output folders, disk and memory before a run does anything."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from exporter.errors import (
    MissingFileError,
    NotEnoughDiskError,
    NotEnoughMemoryError,
    OutOfMemoryError,
    OutputExistsError,
    OverlappingPathsError,
    RecipeError,
)
from exporter.inputs.sources import Source
from exporter.recipe import Inputs
from exporter.tour.walk.sizes import KEEP_BYTES

# Room for export.json and other small files, beside the planned ones.
_SLACK_BYTES = 8 << 20
# torch's words for a CUDA device without memory.
_DEVICE_OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_LESS_MEMORY = "End what else takes memory, or use fewer --threads or tokens, or a machine with more memory."
_LESS_DEVICE_MEMORY = "End what else takes memory there, or use --device cpu, or a device with more memory."


def check_paths(recipe: Inputs, outs: Sequence[Path], sources: tuple[Source, ...]) -> None:
    """Check that outputs do not exist, that their parents can be made, and that no output or input is inside another.

    Args:
        recipe: whether existing folders are replaced, and which text is read.
        outs: every folder that publishing creates.
        sources: base and adapters.

    Raises:
        MissingFileError: the text is not there.
        RecipeError, OutputExistsError, OverlappingPathsError: an output cannot be where it is to be.
    """
    text = recipe.calibration.file
    if text is not None and not text.is_file():
        raise MissingFileError(
            str(text), found="no such file", expected="a .txt or .jsonl file", remedy="Check --calibration."
        )
    inputs = [(source.name, source.folder.resolve()) for source in sources]
    if text is not None:
        inputs.append((text.name, text.resolve()))
    resolved = [out.resolve() for out in outs]
    for number, given in enumerate(outs):
        out = given.absolute()
        if given.name in ("", ".."):
            raise RecipeError(
                "--out", found=repr(str(given)), expected="a folder with a name", remedy="Choose another --out."
            )
        if not all(above.is_dir() for above in out.parents if above.exists()):
            raise OverlappingPathsError(
                str(given),
                found="a file where a folder must be",
                expected="only folders above the output",
                remedy="Choose another --out.",
            )
        if os.path.lexists(out) and not recipe.force:
            raise OutputExistsError(
                str(given),
                found="a file or folder",
                expected="a path that does not exist yet",
                remedy="Choose another --out, or use --force to replace it.",
            )
        # A failed gate replaces OUT.rejected, and a run works in .OUT.staging.
        inside = resolved[number]
        others = [("of another output", other) for index, other in enumerate(resolved) if index != number]
        for place in (inside, inside.with_name(f"{inside.name}.rejected"), inside.with_name(f".{inside.name}.staging")):
            for name, path in inputs + others:
                if place == path or path in place.parents or place in path.parents:
                    raise OverlappingPathsError(
                        str(given),
                        found=f"an output that overlaps {name}",
                        expected="no input or output inside another",
                        remedy="Choose another --out.",
                    )


def check_disk(written: Sequence[tuple[Path, int]]) -> None:
    """Check that each file system has room for the files that are written to it.

    Args:
        written: output folders with the bytes that go there.

    Raises:
        NotEnoughDiskError: one has less.
    """
    needed: Counter[int] = Counter()
    free: dict[int, tuple[Path, int]] = {}
    for out, nbytes in written:
        parent = _existing_parent(out)
        device = parent.stat().st_dev
        needed[device] += nbytes + _SLACK_BYTES - staged_bytes(out)
        free[device] = (parent, shutil.disk_usage(parent).free)
    for device, nbytes in needed.items():
        parent, available = free[device]
        if nbytes > available:
            raise NotEnoughDiskError(
                str(parent),
                found=f"{available / 1e9:.2f} GB free",
                expected=f"{nbytes / 1e9:.2f} GB for the planned files",
                remedy="Free some disk, or choose another --out.",
            )


def states_budget() -> int:
    """Bytes of hidden states that a walk keeps in memory: a quarter of what is available, up to a bound."""
    return min(KEEP_BYTES, psutil.virtual_memory().available // 4)


def check_memory(walk_bytes: int, lighter: Callable[[], Mapping[str, int]]) -> None:
    """Check that there is memory for the walk.

    Args:
        walk_bytes: estimated peak.
        lighter: gives the estimates of settings that take less, by words that follow "with". Called only where memory
            is too small.

    Raises:
        NotEnoughMemoryError: there is less.
    """
    memory = psutil.virtual_memory().available
    if walk_bytes > memory:
        raise NotEnoughMemoryError(
            "the walk through the layers",
            found=f"{memory / 1e9:.1f} GB of memory available",
            expected=f"{walk_bytes / 1e9:.1f} GB",
            remedy=_with_less(lighter(), memory),
        )


def check_device_memory(device: str, walk_bytes: int) -> None:
    """Check that the device that computes has memory for the walk, if the memory is its own.

    Args:
        device: as `exporter.merge.device.resolve_device` gives it.
        walk_bytes: estimated peak there.

    Raises:
        NotEnoughMemoryError: there is less.
    """
    if not device.startswith("cuda"):
        return
    # Not at the top: plans on a CPU must not wait for torch.
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    if walk_bytes > free:
        raise NotEnoughMemoryError(
            f"the walk through the layers on {device}",
            found=f"{free / 1e9:.1f} GB of memory free there",
            expected=f"{walk_bytes / 1e9:.1f} GB",
            remedy=_LESS_DEVICE_MEMORY,
        )


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """The error to raise if a failed allocation is behind this one, on the CPU or on a device; None if not.

    torch raises a RuntimeError that only its text tells from others: c10/core/impl/alloc_cpu.cpp,
    c10/cuda/CUDAException.h, and the status names of cuBLAS.
    """
    behind: BaseException | None = error
    while behind is not None:
        text = str(behind)
        on_device = any(one in text for one in _DEVICE_OUT_OF_MEMORY)
        if isinstance(behind, MemoryError) or (
            isinstance(behind, RuntimeError) and (on_device or "DefaultCPUAllocator: " in text)
        ):
            place = "memory of the device" if on_device else "memory"
            return OutOfMemoryError(
                place,
                found=(text.strip().splitlines() or [type(behind).__name__])[0][:300],
                expected=f"{place} for one more allocation",
                remedy=f"{_LESS_DEVICE_MEMORY if on_device else _LESS_MEMORY} The same command goes on from what is "
                "staged.",
            )
        behind = behind.__context__
    return None


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn failed allocations into `OutOfMemoryError`; see `out_of_memory`. Also a decorator of functions.

    Raises:
        OutOfMemoryError: an allocation failed.
    """
    try:
        yield
    except Exception as raised:
        if (error := out_of_memory(raised)) is not None:
            raise error from raised
        raise


def _with_less(lighter: Mapping[str, int], memory: int) -> str:
    """The remedy: the settings with which the walk fits into memory."""
    fitting = [f"with {name} ({nbytes / 1e9:.1f} GB at least)" for name, nbytes in lighter.items() if nbytes <= memory]
    return f"Run on a machine with more memory{''.join(f', or {one}' for one in fitting)}."


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    return parent


def staged_bytes(out: Path) -> int:
    """Bytes that an earlier run left in the staging folder of an output."""
    staging = out.parent / f".{out.name}.staging"
    return sum(file.stat().st_blocks * 512 for file in staging.rglob("*") if file.is_file()) if staging.is_dir() else 0
