"""How far exported files are from the trained model, on the same tokens: perplexity, KL divergence, same top token.

    python scripts/divergence.py --base DIR [--adapter DIR] FILE_OR_FOLDER… [--tokens 8192] [--json FILE]

A GPTQ folder is unpacked by scripts/unpack_gptq.py, which knows nothing of this package, and computed in float32; a
GGUF file is computed by llama.cpp. The tokens are the evaluation windows of the text, those that an export would score.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from report import table, write_json
from unpack_gptq import unpacked_tensors

from exporter.adapter import Adapter
from exporter.calibration import make_windows
from exporter.checkpoint import Checkpoint
from exporter.merge import resolve_device
from exporter.model import plan_merge
from exporter.recipe import Calibration, Evaluation, Execution
from exporter.runtimes.base import TokenScores
from exporter.runtimes.llamacpp import LlamaCpp
from exporter.runtimes.transformers import score_model
from exporter.verify.divergence import Divergence
from exporter.verify.metrics import Comparison, compare
from exporter.verify.reference import Reference, score_reference


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


def compare_with(reference: Reference, path: Path) -> Comparison:
    """Score one file or folder."""
    divergence = Divergence(reference)
    if path.is_file():
        scores = LlamaCpp().score(path, reference.windows, silent, divergence.take)
    else:
        scores = score_gptq(path, reference, divergence.take)
    return compare(scores, reference.scores, divergence.found(scores))


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
    rows, found = [], {}
    for path in args.paths:
        comparison = compare_with(reference, path)
        found[path.name] = asdict(comparison)
        kl = comparison.divergence
        assert kl is not None
        rows.append(
            [
                path.name,
                f"{comparison.perplexity:.4f}",
                f"{comparison.delta:+.3%}",
                f"{kl.mean:.5f}",
                f"{kl.stderr:.5f}",
                f"{kl.median:.5f}",
                f"{kl.p99:.4f}",
                f"{comparison.same_top:.2%}",
            ]
        )
        print(json.dumps({"path": path.name, "kl": kl.mean, "perplexity": comparison.perplexity}), file=sys.stderr)
    perplexity = next(iter(found.values()))["reference_perplexity"]
    print(f"{windows.tokens_scored} predictions of {windows.source}; the trained model's perplexity {perplexity:.4f}")
    print(table(["artifact", "perplexity", "change", "KL mean", "±", "median", "99 %", "same top"], rows))
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
