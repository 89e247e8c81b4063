"""llama.cpp's own converter, quantizer and perplexity tool, and peft's merge, as the scripts prepare them."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oracle import Oracle

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if str(SCRIPTS) not in sys.path:
    # The scripts import each other by plain names, as they do when they are run.
    sys.path.insert(0, str(SCRIPTS))

# What this package says differently from llama.cpp's converter on purpose: patterns of keys, and why.
DIFFERENT_METADATA = {
    "general.tags": "the converter adds the card's pipeline_tag, the hub's word for a task, to the card's own tags",
    "general.base_model.*": "the card says what the base was made from, and this file is not made from that",
    "general.dataset.*": "the card says what the base was trained on, and this model was trained on more",
    "tokenizer.chat_template*": "of several named templates only the default one is taken, the adapter's goes before "
    "the base's, and a file of its own goes before tokenizer_config.json, as in transformers",
}


@cache
def prepared() -> Oracle:
    """The oracle; the first time on a machine it is downloaded and built, which takes minutes."""
    from oracle import prepare

    return prepare()


def convert(model: Path, out: Path, outtype: str = "f32", name: str | None = "model") -> Path:
    """What llama.cpp's converter makes of a model folder whose tokenizer is one of the tests' own."""
    return prepared().convert(model, out, outtype, assume_pre="qwen2", name=name)


def merge_with_peft(base: Path, adapter: Path | None, out: Path) -> Path:
    """The merged model in float32 as peft computes it, with the base's own configuration and tokenizer files."""
    from peft_merge import copy_base_files, merge

    merge(base, adapter, out, "fp32", "fp32")
    copy_base_files(base, out, "fp32")
    return out


def perplexity(file: Path, text: Path, n_ctx: int, windows: int, batch: int | None = None) -> tuple[float, float]:
    """Perplexity of the first windows of a text and its ±, as llama-perplexity prints them.

    By default the tool decodes several windows in one batch, which changes the last digits; a batch of `n_ctx` tokens
    makes it decode one at a time. It is asked again where its last line is lost, which its logger does now and then.
    """
    from oracle import FINAL_ESTIMATE

    command = [str(prepared().perplexity_tool), "-m", str(file), "-f", str(text), "-c", str(n_ctx), "-t", "2"]
    command += ["--chunks", str(windows)] + ([] if batch is None else ["-b", str(batch)])
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
        if found := FINAL_ESTIMATE.search(done.stdout + done.stderr):
            return float(found[1]), float(found[2])
    raise AssertionError(f"no final estimate in 20 runs:\n{(done.stdout + done.stderr)[-2000:]}")
