"""Measures the speed of artifacts in the runtimes that serve them, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import RuntimeScoreError
from exporter.runtimes.base import Session
from exporter.runtimes.registry import load_runtime
from exporter.tokens.embedded import embedded_beginning
from exporter.verify.published.manifest_record import read_manifest

if TYPE_CHECKING:
    from exporter.plan.reporter import Reporter


PROMPT_TOKENS = 512
OUTPUT_TOKENS = 64
# Prompts of the answers are short, so that the time goes into the tokens that follow.
_START_TOKENS = 16
# The fastest of several runs was disturbed the least.
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """The measured speed of an artifact, one request at a time.

    Attributes:
        runtime: the runtime that served it, with its version.
        prompt: tokens of a prompt a second.
        output: tokens of an answer a second; None if no answer was long enough.
    """

    runtime: str
    prompt: float
    output: float | None


def measure_folders(folders: Sequence[Path], device: str, reporter: Reporter) -> dict[tuple[Path, str, str], Speed]:
    """Measure all artifacts, by folder, format and type. Each is loaded alone, one after another.

    Args:
        folders: output folders, published or rejected.
        device: the device on which transformers computes.
        reporter: told about every artifact.

    Raises:
        ArtifactError: a folder has no manifest.
        RecipeError: no runtime of an artifact is available.
        RuntimeScoreError: a runtime cannot load or run an artifact.
    """
    found = {}
    for folder in folders:
        for artifact in read_manifest(folder).artifacts:
            name = artifact.runtime(folder)
            reporter.doing(f"speed of {artifact.label} in {name}")
            runtime = load_runtime(name, device)
            opening = runtime.session(artifact.path(folder).resolve(), PROMPT_TOKENS + OUTPUT_TOKENS)
            if opening is None:
                raise RuntimeScoreError(
                    f"runtime {name}", found="a runtime that only scores", expected="one that answers prompts",
                    remedy="Leave --speed out.",
                )  # fmt: skip
            with opening as session:
                prompt, output = measure(session)
            found[folder, artifact.format, artifact.quant] = Speed(runtime.version(), prompt, output)
    reporter.scored()
    return found


def measure(session: Session, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float | None]:
    """Measure tokens a second of a prompt of 512, and of answers of 64 each to short prompts.

    An answer's time is the time of 64 tokens less the time of one. So reading its prompt does not count.

    Args:
        session: a loaded artifact.
        clock: gives seconds.
    """
    ids = (session.tokenize(embedded_beginning()[: 8 * PROMPT_TOKENS], special=True) or [])[:PROMPT_TOKENS]

    def seconds(prompt: Sequence[int], tokens: int) -> tuple[float, int]:
        started = clock()
        (answer,) = session.generate([prompt], tokens)
        return clock() - started, len(answer.tokens)

    reading = min(seconds(ids, 1)[0] for _ in range(REPEATS))
    rates = []
    for number in range(REPEATS):
        prompt = ids[number * _START_TOKENS : (number + 1) * _START_TOKENS]
        first, _ = seconds(prompt, 1)
        whole, tokens = seconds(prompt, OUTPUT_TOKENS)
        # An answer may end at once; a clock may be too coarse for a tiny model.
        if tokens > 1 and whole > first:
            rates.append((tokens - 1) / (whole - first))
    return len(ids) / reading, max(rates, default=None)
