"""How far exported files are from the trained model, on the same tokens: perplexity, KL divergence, same top token.

    python -m scripts.measurements.divergence --base DIR [--adapter DIR] FILE_OR_FOLDER… [--tokens 8192] [--json FILE]

scripts/oracles/unpack_gptq.py, which knows nothing of this package's writer, unpacks a GPTQ folder, and transformers
computes it in float32. Transformers computes another model folder in its own dtype, and llama.cpp a GGUF file. The
tokens are the evaluation windows of the text, those that an export would score.

The KL divergence is taken in both forms: over the whole vocabulary, and over as many of the artifact's likeliest tokens
as vLLM gives and one bucket for all others. `ratio` is the second mean over the first, with the least and the largest
of a window.

Errors are over windows. Two artifacts stumble over the same tokens, so the errors of their means say little of how they
differ: of every two there is the difference of their mean KL divergences, taken window by window, with an error and a
95 % interval of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.adapters.adapter import Adapter
from exporter.inputs.checkpoint import Checkpoint
from exporter.libraries.gptqmodel import is_gptq
from exporter.merge.device import resolve_device
from exporter.merge.model import plan_merge
from exporter.recipe import Calibration, Evaluation, Execution
from exporter.reference.predictions import Reference, score_reference
from exporter.runtimes.base import TokenScores, TopK
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.runtimes.transformers.runtime import Transformers, score_model
from exporter.runtimes.vllm.runtime import TOP
from exporter.tokens.windows import make_windows
from exporter.verify.scores.divergence import Divergence, top_k_divergences
from exporter.verify.scores.intervals import clustered_stderr, interval
from exporter.verify.scores.metrics import Comparison, Divergences, Floats, compare
from scripts.oracles.unpack_gptq import unpacked_tensors
from scripts.tables import table, write_json


def silent(_: int) -> None:
    """Takes the number of windows that were scored, and says nothing."""


def score_gptq(folder: Path, reference: Reference, take: Callable[[int, torch.Tensor], None]) -> TokenScores:
    """Score a GPTQ folder: unpacked, in float32, in transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = model.state_dict()
    missing = set(state) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for name, values in unpacked_tensors(folder):
        state[name].copy_(torch.from_numpy(values))
        missing.discard(name)
    if missing:
        raise ValueError(f"{folder} lacks {sorted(missing)[0]}")
    return score_model(model.eval(), reference.windows, silent, take)


def likeliest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each prediction, as a server gives them.

    Args:
        logits: float32, shape (positions, vocabulary).
        k: how many.

    Returns:
        Their ids and their log-probabilities in float32, each of shape (positions, k), likeliest first.
    """
    found = torch.log_softmax(logits, dim=1).topk(k, dim=1)
    return found.indices, found.values


def compare_with(reference: Reference, path: Path, k: int = TOP) -> tuple[Comparison, Divergences]:
    """Score one file or folder: the comparison, and both forms of the divergence by position."""
    divergence = Divergence(reference)
    tops: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(window: int, logits: torch.Tensor) -> None:
        divergence.take(window, logits)
        tops.append(likeliest(logits, k))

    if path.is_file():
        scores = LlamaCpp().score(path, reference.windows, silent, take)
    elif is_gptq(path):
        scores = score_gptq(path, reference, take)
    else:
        scores = Transformers().score(path, reference.windows, silent, take)
    ids, log_probabilities = (torch.stack(side).numpy() for side in zip(*tops, strict=True))
    top = TopK(ids, log_probabilities.astype(np.float64))
    found = replace(divergence.found(scores), top_k=top_k_divergences(reference, top), k=k)
    return compare(scores, reference.scores, found), found


def ratio(found: Divergences) -> str:
    """The mean of the top-k form over that of the full one, and the least and the largest of a window."""
    assert found.kl is not None
    assert found.top_k is not None
    windows = found.top_k.mean(axis=1) / found.kl.mean(axis=1)
    return f"{found.top_k.mean() / found.kl.mean():.3f} ({windows.min():.3f} to {windows.max():.3f})"


@dataclass(frozen=True)
class Paired:
    """How the mean KL divergences of two artifacts differ on the same tokens.

    Attributes:
        first: name of one.
        second: name of the other.
        difference: the first's mean minus the second's, in nats.
        stderr: its standard error over the windows; None for one window.
        interval: its 95 % interval; None likewise.
    """

    first: str
    second: str
    difference: float
    stderr: float | None
    interval: tuple[float, float] | None


def paired(by_name: Mapping[str, Floats]) -> list[Paired]:
    """The paired difference of every two artifacts.

    Args:
        by_name: KL divergences by position of each, shape (windows, scored), all of the same tokens.
    """
    found = []
    for (first, ours), (second, theirs) in combinations(by_name.items(), 2):
        difference = ours - theirs
        mean, stderr = float(difference.mean()), clustered_stderr(difference)
        ends = None if stderr is None else interval(mean, stderr, len(difference))
        found.append(Paired(first, second, mean, stderr, ends))
    return found


def paired_table(pairs: list[Paired]) -> str:
    """Every two artifacts, and whether their interval leaves out zero."""
    rows = [
        [
            f"{one.first} - {one.second}",
            f"{one.difference:+.5f}",
            "-" if one.stderr is None else f"{one.stderr:.5f}",
            "-" if one.interval is None else " to ".join(f"{end:+.5f}" for end in one.interval),
        ]
        for one in pairs
    ]
    return table(["paired difference of mean KL", "nats", "±", "95 % interval"], rows)


def names_of(paths: list[Path]) -> list[str]:
    """A name for each: as much of the end of its path as tells it from the others."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--calibration", type=Path, help="text; default: the embedded one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    adapters = (Adapter.open(args.adapter),) if args.adapter else ()
    model = plan_merge(Checkpoint.open(args.base), adapters, "model")
    windows = make_windows(Calibration(text=args.calibration), Evaluation(tokens=args.tokens), model.tokenizer)
    threads = Execution().workers
    reference = score_reference(model, windows, resolve_device("cpu"), threads=threads)
    torch.set_num_threads(threads)
    rows, found, by_name = [], {}, {}
    for name, path in zip(names_of(args.paths), args.paths, strict=True):
        comparison, divergences = compare_with(reference, path)
        found[name] = asdict(comparison)
        kl, top = comparison.divergence, comparison.top_k_divergence
        assert kl is not None
        assert top is not None
        assert divergences.kl is not None
        by_name[name] = divergences.kl
        rows.append(
            [
                name,
                f"{comparison.perplexity:.4f}",
                f"{comparison.delta:+.3%}",
                f"{kl.mean:.5f}",
                f"{kl.stderr:.5f}",
                f"{kl.median:.5f}",
                f"{kl.p99:.4f}",
                f"{comparison.same_top:.2%}",
                f"{top.mean:.5f}",
                ratio(divergences),
            ]
        )
        print(json.dumps({"path": name, "kl": kl.mean, "perplexity": comparison.perplexity}), file=sys.stderr)
    perplexity = next(iter(found.values()))["reference_perplexity"]
    print(f"{windows.tokens_scored} predictions of {windows.source}; the trained model's perplexity {perplexity:.4f}")
    titles = ["artifact", "perplexity", "change", "KL mean", "±", "median", "99 %", "same top", f"top {TOP}", "ratio"]
    print(table(titles, rows))
    pairs = paired(by_name)
    if pairs:
        print("\n" + paired_table(pairs))
    for one in pairs:
        found[one.first].setdefault("paired", {})[one.second] = asdict(one)
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
