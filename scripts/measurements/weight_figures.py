"""The stored weights of published folders beside their limits: the figures of sound ones in docs/measurements.

    python -m scripts.measurements.weight_figures FOLDER… --base DIR [--adapter DIR] [--json FILE]
    python -m scripts.measurements.weight_figures FOLDER… --reference PACK [--json FILE]

Reads every artifact back and compares it with base and adapter, as `exporter verify --files-only` does. That command
prints faults; this script prints the figures:

- by stored type the largest relative error of a tensor and of a group, and how far the scale of a group and the mean of
  a row are off at most, each with its limit in brackets and as a share of it (of the tensor that takes the most of it);
- the survival of the adapter's change, and by how many standard errors it is off, root mean square over the tensors;
- of types whose sound groups may lose large values (GPTQ), the groups that lost more than a fifth of their size, and
  the largest cosine between the error and the merged values of these: above `PARALLEL`, a scale is taken to be off;
- CPU seconds of reading back and comparing.

With a reference pack in place of base and adapter: the figures that its sketches estimate, of tensors, of runs of 512
columns and of the survival of a tensor.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.backends.registry import load_backend
from exporter.backends.weight_reader import StoredWeight, WeightReader
from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES, row_blocks
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.device import make_merger
from exporter.merge.model import MergedModel
from exporter.plan.open_model import open_trained
from exporter.recipe import Execution
from exporter.reference.pack.description import read_description
from exporter.reference.pack.reader import StoredSketches, opened_pack
from exporter.verify.published.manifest_record import PublishedArtifact, read_manifest
from exporter.verify.weights.check import WeightsResult, check_weights
from exporter.verify.weights.limits import LimitCheck
from exporter.verify.weights.sketch_check import check_sketches
from exporter.verify.weights.sums import PARALLEL
from scripts.tables import table, write_json

ESTIMATES = {"relative_error": "tensor", "group": "run", "survival": "survival"}
MEASURES = {"relative_error": "tensor", "group": "group", "scale": "scale of a group", "row_mean": "mean of a row"}
LOST = 0.2


@dataclass(frozen=True)
class Lost:
    """Groups whose error is against their values by more than `LOST` of their size.

    Attributes:
        groups: how many there are in all.
        lost: how many are so.
        cosine: the largest cosine between the error of one of them and its values; 0 if there is none.
    """

    groups: int = 0
    lost: int = 0
    cosine: float = 0.0

    def plus(self, other: Lost) -> Lost:
        """Both together."""
        return Lost(self.groups + other.groups, self.lost + other.lost, max(self.cosine, other.cosine))


def lost_groups(stored: npt.NDArray[np.float32], merged: npt.NDArray[np.float32], weight: StoredWeight) -> Lost:
    """Count the groups of some rows, in float64.

    Args:
        stored: what is stored, shape (rows, columns).
        merged: the merge, likewise.
        weight: its groups and tolerance.
    """
    values = merged.astype(np.float64).reshape(-1, weight.group)
    error = stored.astype(np.float64).reshape(values.shape) - values
    norms, errors, against = (values**2).sum(axis=1), (error**2).sum(axis=1), -(error * values).sum(axis=1)
    # As the limit on scales has it: what a smallest step of a scale makes does not count.
    slack = np.sqrt(weight.group * norms) * weight.tolerance.resolution
    lost = against - slack > LOST * norms
    cosines = against[lost] / np.sqrt(errors[lost] * norms[lost])
    return Lost(len(values), int(lost.sum()), float(cosines.max(initial=0.0)))


def lost_by_type(model: MergedModel, reader: WeightReader) -> dict[str, Lost]:
    """Those of all tensors, by stored type; of the types alone whose sound groups may lose large values."""
    found: dict[str, Lost] = {}
    with TensorReader() as bases:
        merger = make_merger("cpu", bases)
        for tensor in model.tensors:
            weight = reader.weights.get(tensor.name)
            if weight is None or not weight.tolerance.clipped:
                continue
            factors = merger.factors(tensor)
            for block in row_blocks(tensor.source, DEFAULT_BLOCK_BYTES, "cpu"):
                merged = merger.block(tensor, block, factors).numpy()
                part = lost_groups(reader.rows(weight, block.first, block.count).values, merged, weight)
                found[weight.type] = found.get(weight.type, Lost()).plus(part)
    return found


def nearest_by_type(result: WeightsResult) -> dict[str, dict[str, LimitCheck]]:
    """Of every stored type and measure, the figure that takes the most of its limit."""
    found: dict[str, dict[str, LimitCheck]] = {}
    for weight, sums in result.tensors:
        figures = found.setdefault(weight.type, {})
        for check in result.checks(weight, sums):
            if check.measure not in figures or check.share > figures[check.measure].share:
                figures[check.measure] = check
    return found


def shown(check: LimitCheck | None) -> str:
    """A figure, its limit and what it takes of it."""
    return "-" if check is None else f"{check.value:.3g} ({check.limit:.3g}) {check.share:.2f}"


def survival_off(result: WeightsResult) -> float | None:
    """By how many standard errors survival is off 1: root mean square over the tensors that have a delta."""
    squares = [
        ((survival - 1) / stderr) ** 2
        for survival, stderr in ((sums.survival, sums.survival_stderr) for _, sums in result.tensors)
        if survival is not None and stderr
    ]
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def print_artifact(
    folder: Path, artifact: PublishedArtifact, model: MergedModel, sketches: StoredSketches | None
) -> dict[str, object]:
    """Read one artifact back and print its tables.

    Args:
        folder: where it is.
        artifact: the artifact.
        model: what it should hold.
        sketches: all that is known of the model's weights; None if they can be read.

    Raises:
        ValueError: what writes its format cannot read it back.
    """
    reader = load_backend(artifact.format).read(model, artifact.quant, artifact.path(folder))
    if reader is None:
        raise ValueError(f"{artifact.label} cannot be read back")
    measures = MEASURES if sketches is None else ESTIMATES
    try:
        started, threads = time.process_time(), Execution().workers
        if sketches is None:
            result = check_weights(model, reader, threads)
        else:
            result = check_sketches(model, reader, threads, {}, sketches)
        seconds = time.process_time() - started
        lost = lost_by_type(model, reader) if sketches is None else {}
    finally:
        reader.close()
    print(f"\n{folder}: {artifact.label}, {seconds:.1f} CPU seconds, {len(result.broken)} limits broken")
    nearest = nearest_by_type(result)
    counts = {kind: sum(weight.type == kind for weight, _ in result.tensors) for kind in nearest}
    rows = [
        [kind, str(counts[kind]), *(shown(figures.get(measure)) for measure in measures)]
        for kind, figures in nearest.items()
    ]
    print(table(["type", "tensors", *(f"{name} (limit) share" for name in measures.values())], rows))
    whole, off = result.updated, survival_off(result)
    if whole.survival is not None and off is not None:
        print(f"survival {whole.survival:.4f} ± {whole.survival_stderr:.4f}; off by {off:.2f} standard errors a tensor")
    for kind, one in lost.items():
        print(
            f"{kind}: {one.lost} of {one.groups} groups lost more than {LOST:.0%}, cosine at most {one.cosine:.3f} "
            f"(limit {PARALLEL})"
        )
    return {
        "cpu_seconds": seconds,
        "broken": result.broken,
        "nearest": {kind: {key: asdict(check) for key, check in one.items()} for kind, one in nearest.items()},
        "survival": whole.survival,
        "survival_stderr": whole.survival_stderr,
        "survival_off": off,
        "lost": {kind: asdict(one) for kind, one in lost.items()},
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--base")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.base is None) == (args.reference is None):
        parser.error("either --base or --reference is needed")
    found = {}
    with ExitStack() as stack:
        model, sketches = None, None
        if args.reference:
            description = read_description(args.reference)
            pack = stack.enter_context(opened_pack(args.reference, description, "model", "cpu", Execution().workers))
            model, sketches = pack.model, pack.sketches
        for folder in args.folders:
            manifest = read_manifest(folder)
            judged = model or open_trained(args.base, tuple(args.adapter), manifest.name)
            for artifact in manifest.artifacts:
                found[f"{folder}: {artifact.label}"] = print_artifact(folder, artifact, judged, sketches)
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
