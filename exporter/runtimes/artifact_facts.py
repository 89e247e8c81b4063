"""The facts of an artifact that a runtime goes by, from before it is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackedWeights:
    """One kind of packed weights, for which a runtime needs kernels or packages that plain weights do without.

    Attributes:
        method: how they are quantized and laid out, as `quant_method` of a config.json names it: `gptq`.
        bits: of one weight.
        experts: whether they are those of experts; for these runtimes have kernels of their own.
    """

    method: str
    bits: int
    experts: bool = False


@dataclass(frozen=True)
class ArtifactFacts:
    """What is known of an artifact when its export is planned.

    Attributes:
        format: the name of its backend.
        quant: its quantization type.
        entry: what a runtime loads, relative to the output folder: a file, or `.` for the folder itself.
        files: names of its files, relative to the output folder.
        packed: every kind of packed weights in it; empty if it has none.
    """

    format: str
    quant: str
    entry: str
    files: frozenset[str]
    packed: frozenset[PackedWeights] = frozenset()

    @property
    def is_plain_model_folder(self) -> bool:
        """Whether it is a folder with the configuration of a model and weights in safetensors, none of them packed."""
        weights = any(name.endswith(".safetensors") for name in self.files)
        return self.entry == "." and "config.json" in self.files and weights and not self.packed
