"""Chooses the device, and makes its merger."""

from __future__ import annotations

import torch

from exporter.errors import DeviceUnavailableError
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.cpu import CpuMerger
from exporter.merge.merger import Merger


def resolve_device(name: str) -> str:
    """Turn `auto` into `cuda` or `cpu` and check that the device exists.

    Raises:
        DeviceUnavailableError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise DeviceUnavailableError(
            f"--device {name}",
            found=f"{count} CUDA devices",
            expected="that device",
            remedy="Use --device auto or cpu.",
        )
    return name


def make_merger(device: str, reader: TensorReader) -> Merger:
    """The merger for a device that `resolve_device` returned."""
    if device == "cpu":
        # Parallelism is over row blocks; more threads inside a small product would only wait for each other.
        torch.set_num_threads(1)
        return CpuMerger(reader)
    from exporter.merge.cuda import CudaMerger

    return CudaMerger(reader, device)
