"""By how much the reference prefers its own tokens to an artifact's: sound types, and models that are broken in part.

    python -m scripts.measurements.shortfalls --base .cache/demo/base --adapter .cache/demo/adapter --work DIR

Exports every type, breaks copies of the one in F16 in several ways, asks all of them what verification asks
(`exporter.verify.answers`), and prints the largest mean shortfall of each one's continuations in nats, with the limit.
The files are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter import Recipe, export
from exporter.artifact.file_records import MANIFEST_NAME
from exporter.merge.model import MergedModel
from exporter.plan.open_model import open_trained
from exporter.plan.reporter import Reporter
from exporter.recipe import Execution
from exporter.runtimes.registry import load_runtime
from exporter.verify.answers.judge import MAX_SHORTFALL, Answers
from exporter.verify.answers.run import Served, WalkedModel, answers_of
from scripts.sabotage.damage import Damaged
from scripts.sabotage.faults import layer, ones_for_norms, zero
from scripts.sabotage.statements import wrong_rope
from scripts.tables import table, write_json

TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0", "Q3_K_S", "Q2_K", "IQ2_XXS", "IQ1_S")
PROJECTIONS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


def layers_of(damaged: Damaged) -> range:
    """Numbers of the layers."""
    return range(int(damaged.config["num_hidden_layers"]))


def swap_layers(damaged: Damaged) -> None:
    """Exchange all matrices of the first two layers."""
    for part in PROJECTIONS:
        first, second = (damaged.stored(layer(damaged, part, number))["weight"] for number in (0, 1))
        kept = first.copy()
        first[...] = second
        second[...] = kept


def add_noise(damaged: Damaged) -> None:
    """Noise of half their deviation on all projections."""
    generator = np.random.default_rng(0)
    for number in layers_of(damaged):
        for part in PROJECTIONS:
            values = damaged.stored(layer(damaged, part, number))["weight"].view("<f2")
            noise = generator.standard_normal(values.shape, dtype=np.float32)
            values[...] = (values + 0.5 * values.astype(np.float32).std() * noise).astype(np.float16)


def reverse_rows(damaged: Damaged) -> None:
    """The rows of one o_proj the other way round."""
    values = damaged.stored(layer(damaged, "self_attn.o_proj"))["weight"]
    values[...] = values[::-1].copy()


FAULTS: Mapping[str, Callable[[Damaged], None]] = {
    "two layers swapped": swap_layers,
    "one down_proj of zeros": zero,
    "norms of q and k lost": ones_for_norms,
    "another rope theta": wrong_rope,
    "noise of half their deviation on all projections": add_noise,
    "rows of one o_proj reversed": reverse_rows,
}


def make(base: str, adapters: list[str], out: Path, format_: str, quant: str, **values: Any) -> Path:
    """Export one type, unverified; returns what a runtime loads."""
    output = {"format": format_, "quant": [quant], "out": str(out)}
    recipe = {"base": base, "adapters": adapters, "outputs": [output], "verify": False, "name": "model"}
    export(Recipe.build(recipe | values), Execution())
    return out / f"model-{quant}.gguf" if format_ == "gguf" else out


def largest(answers: Answers) -> float:
    """The largest mean shortfall of the continuations."""
    return max(float(one.shortfall.mean()) for one in answers.followed.values())


def artifacts(base: str, adapters: list[str], work: Path) -> Iterator[tuple[str, Path]]:
    """Every artifact with its name, sound ones first."""
    for quant in TYPES:
        yield f"gguf {quant}", make(base, adapters, work / quant, "gguf", quant)
    yield "safetensors bf16", make(base, adapters, work / "bf16", "safetensors", "bf16")
    yield "F16, adapter left out", make(base, [], work / "without", "gguf", "F16")
    config = json.loads((Path(base) / "config.json").read_text("utf-8"))
    manifest = json.loads((work / "F16" / MANIFEST_NAME).read_text("utf-8"))
    for number, (name, apply) in enumerate(FAULTS.items()):
        damaged = Damaged(work / "F16", manifest, work / f"fault-{number}", config)
        apply(damaged)
        yield f"F16, {name}", damaged.folder / damaged.entry


def shortfalls(model: MergedModel, entries: Mapping[str, Path]) -> dict[str, float]:
    """The largest mean shortfall of each artifact, by its name; the reference walks once for all of them.

    Raises:
        ValueError: a runtime does nothing but score, or cannot answer.
    """
    served = [
        Served(name, entry, load_runtime("llamacpp" if entry.suffix == ".gguf" else "transformers"))
        for name, entry in entries.items()
    ]
    answers = answers_of(WalkedModel(model, "cpu", Execution().workers), served, Reporter())
    found = {}
    for one, answered in zip(served, answers, strict=True):
        if answered is None or isinstance(answered, str):
            raise ValueError(f"{one.runtime.name} gives no answers{f': {answered}' if answered else ''}")
        found[one.label] = largest(answered)
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = open_trained(args.base, tuple(args.adapter), "model")
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        found = shortfalls(model, dict(artifacts(args.base, args.adapter, Path(work))))
    print(table(["artifact", "mean shortfall"], [[name, f"{value:.3f}"] for name, value in found.items()]))
    print(f"limit: {MAX_SHORTFALL}")
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
