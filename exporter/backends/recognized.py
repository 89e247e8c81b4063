"""What a backend says of an artifact that came without a manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recognized:
    """An artifact that a backend recognizes as its own.

    Attributes:
        quant: the quantization type, resolved.
        entry: what a runtime loads, relative to the artifact's folder: a file, or `.` for the folder itself.
        runtimes: runtimes that can verify it, the preferred one first.
        parameters: number of weights that its tensors stand for.
        vocabulary: number of tokens that it knows; 0 if it does not say.
        nbytes: bytes of the files that hold its weights.
    """

    quant: str
    entry: str
    runtimes: tuple[str, ...]
    parameters: int
    vocabulary: int
    nbytes: int
