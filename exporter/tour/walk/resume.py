"""What a killed tour goes on from: hidden states, statistics and findings up to the last finished layer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from exporter.artifact.durable import sync_folder, write_durably
from exporter.backends.base import Finding
from exporter.tour.walk.activations import SecondMoments
from exporter.tour.walk.hidden_states import States


@dataclass
class Findings:
    """What became of the matrices of every solver, by its label."""

    by_label: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, label: str, findings: Sequence[Finding]) -> None:
        """Note what became of some matrices."""
        self.by_label.setdefault(label, []).extend(findings)


def save_progress(scratch: Path, key: str, layers: int, states: Sequence[States], findings: Findings) -> None:
    """Make everything up to a layer durable; whatever was saved before stays valid until all of it is.

    Args:
        scratch: the folder.
        key: what the tour is for; `load_progress` finds nothing under another one.
        layers: layers that are done.
        states: hidden states after the last of them.
        findings: what became of their matrices.
    """
    for number, one in enumerate(states):
        one.save(_states_file(scratch, number, layers))
    found = {label: [asdict(finding) for finding in some] for label, some in findings.by_label.items()}
    write_durably(scratch / "progress.new", json.dumps({"key": key, "layers": layers, "findings": found}).encode())
    os.replace(scratch / "progress.new", scratch / "progress")
    sync_folder(scratch)


def load_progress(scratch: Path, key: str, states: Sequence[States], findings: Findings) -> int:
    """Read back what an earlier run of the same tour saved.

    Returns:
        Layers that are done; 0 if nothing usable is there, and then `findings` is as it was.
    """
    try:
        saved = json.loads((scratch / "progress").read_bytes())
        layers = int(saved["layers"])
        found = {label: [Finding(**entry) for entry in some] for label, some in saved["findings"].items()}
        if saved["key"] != key:
            return 0
        for number, one in enumerate(states):
            one.load(_states_file(scratch, number, layers))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
    findings.by_label.update(found)
    return layers


def forget_progress(scratch: Path) -> None:
    """Let the next `load_progress` find nothing."""
    (scratch / "progress").unlink(missing_ok=True)


def save_moments(scratch: Path, layer: int, moments: Mapping[str, SecondMoments]) -> None:
    """Keep a layer's second moments; they are durable with the next `save_progress`."""
    content = {name: torch.cat([one.sums, torch.tensor([float(one.tokens)])]) for name, one in moments.items()}
    file = scratch / f"moments-{layer}.safetensors"
    save_file(content, file)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_moments(scratch: Path, layers: int) -> list[dict[str, SecondMoments]] | None:
    """The second moments of the first `layers` layers, or None if one's are not there."""
    found = []
    for layer in range(layers):
        moments = {}
        try:
            for name, values in load_file(scratch / f"moments-{layer}.safetensors").items():
                moments[name] = one = SecondMoments(values.numel() - 1, int(values[-1]))
                one.sums = values[:-1].clone()
        except (OSError, ValueError, SafetensorError):
            return None
        found.append(moments)
    return found


def _states_file(scratch: Path, number: int, layers: int) -> Path:
    """Two files in turn: the one of the layer before must outlive the writing of this one's."""
    return scratch / f"states-{number}-{layers % 2}"
