"""The tour for the reference alone: how long it takes, where the time goes, and how much memory it needs.

    python -m scripts.benchmarks.tour --base DIR [--adapter DIR] [--tokens 2048] [--device cpu]

Walks through the model with random token ids in windows of 512, and scores them with the head. Meant for a model of a
large shape with random weights (scripts/benchmarks/make_random_model.py). Nothing is written.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from exporter.adapters.adapter import Adapter
from exporter.families.roles import EMBEDDING
from exporter.inputs.checkpoint import Checkpoint
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.device import make_merger, resolve_device
from exporter.merge.model import plan_merge
from exporter.plan.estimate import PlannedWalk
from exporter.recipe import Execution
from exporter.reference.predictions import evaluation_group, finish_reference
from exporter.tokens.windows import TokenSets, Windows
from exporter.tour.riders import Passengers, Settings
from exporter.tour.stream import Progress, Stream
from exporter.tour.walk.walk import Walk
from scripts.benchmarks import measure
from scripts.tables import table

N_CTX = 512


class TimedStream(Stream):
    """A stream that knows how long it took."""

    seconds = 0.0

    def offer(self, *arguments: Any, **options: Any) -> None:
        """See `Stream`."""
        started = time.perf_counter()
        super().offer(*arguments, **options)
        self.seconds += time.perf_counter() - started


def random_windows(tokens: int, vocabulary: int) -> Windows:
    """Windows of random ids."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (max(1, tokens // N_CTX), N_CTX))
    return Windows(tuple(tuple(map(int, row)) for row in ids), N_CTX, "random", "")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = resolve_device(args.device)
    adapters = (Adapter.open(args.adapter),) if args.adapter else ()
    model = plan_merge(Checkpoint.open(args.base), adapters, "model")
    vocabulary = next(tensor.shape[0] for tensor in model.tensors if tensor.name == EMBEDDING)
    windows = random_windows(args.tokens, vocabulary)
    planned = PlannedWalk(model, (), TokenSets(windows, None), "float32").memory
    print(f"machine     {measure.machine()}")
    print(f"model       {model.parameters / 1e9:.2f} G parameters, {model.base.nbytes / 1e9:.1f} GB", flush=True)
    started = time.perf_counter()
    with ExitStack() as stack:
        reader = stack.enter_context(TensorReader())
        merger, threads = make_merger(device, reader), Execution().workers
        stream = TimedStream(model, (), merger, threads=threads, block_bytes=4 << 20, progress=Progress())
        stack.callback(stream.close)
        settings = Settings(device, threads=threads)
        group = evaluation_group(windows)
        walk = Walk(model, stream, Passengers(), evaluation=group, calibration=None, settings=settings)
        built = time.perf_counter()
        walked = walk.run()
        done = time.perf_counter()
        finish_reference(walk, walked, windows, device).complete()
    scored = time.perf_counter()
    whole = scored - started
    parts = {
        "model without weights": built - started,
        "reading and merging": stream.seconds,
        "layers": done - built - stream.seconds,
        "head and scores": scored - done,
        "all": whole,
    }
    print(table(["part", "s", "share"], [[name, f"{took:.1f}", f"{took / whole:.0%}"] for name, took in parts.items()]))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{windows.tokens} tokens, {windows.tokens / whole:.1f} a second")
    print(f"peak {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f} GB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
