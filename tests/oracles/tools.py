"""llama.cpp's own converter, quantizer, perplexity and imatrix tools, and peft's merge, as the scripts prepare them."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.oracles.llamacpp import Oracle

# What this package says differently from llama.cpp's converter on purpose: patterns of keys, and why.
DIFFERENT_METADATA = {
    "general.tags": "the converter adds the card's pipeline_tag, the hub's word for a task, to the card's own tags",
    "general.base_model.*": "the card says what the base was made from, and this file is not made from that",
    "general.dataset.*": "the card says what the base was trained on, and this model was trained on more",
    "quantize.imatrix.file": "llama-quantize notes the path that it was given, and ours the file beside the artifact",
    "quantize.imatrix.dataset": "likewise a path there, and here the name of the file",
    "tokenizer.chat_template*": "of several named templates only the default one is taken, the adapter's goes before "
    "the base's, and a file of its own goes before tokenizer_config.json, as in transformers",
}

# A line of the tables at the end of llama-perplexity --kl-divergence: a name, a figure, perhaps its error.
STATISTIC = re.compile(r"^([^:\n]*\S)\s*:\s+(-?[0-9.]+)", re.MULTILINE)


@cache
def prepared() -> Oracle:
    """The oracle; the first time on a machine it is downloaded and built, which takes minutes."""
    from scripts.oracles.llamacpp import prepare

    return prepare()


def oracle_error() -> type[Exception]:
    """What the oracle raises where one of llama.cpp's tools fails; its text is the end of what the tool printed."""
    from scripts.oracles.llamacpp import OracleError

    return OracleError


def convert(model: Path, out: Path, outtype: str = "f32", name: str | None = "model") -> Path:
    """What llama.cpp's converter makes of a model folder whose tokenizer is one of the tests' own."""
    return prepared().convert(model, out, outtype, assume_pre="qwen2", name=name)


def merge_with_peft(base: Path, adapter: Path | None, out: Path) -> Path:
    """The merged model in float32 as peft computes it, with the base's own configuration and tokenizer files."""
    from scripts.oracles.peft_merge import copy_base_files, merge

    merge(base, adapter, out, "fp32", "fp32")
    copy_base_files(base, out, "fp32")
    return out


def run_llama_imatrix(model: Path, text: Path, **options: Any) -> Path:
    """The importance matrix that llama-imatrix makes of a GGUF file and a text, beside the text.

    Windows of 512 tokens, special tokens parsed as such, GGUF form; `options` are those of `Oracle.imatrix`.
    """
    suffix = "dat" if options.get("legacy") else "gguf"
    out = text.with_name(f"{model.stem}-{text.stem}.imatrix.{suffix}")
    return prepared().imatrix(model, text, options.pop("out", out), threads=options.pop("threads", 2), **options)


def perplexity(file: Path, text: Path, n_ctx: int, windows: int, batch: int | None = None) -> tuple[float, float]:
    """Perplexity of the first windows of a text and its ±, as llama-perplexity prints them.

    By default the tool decodes several windows in one batch, which changes the last digits; a batch of `n_ctx` tokens
    makes it decode one at a time. It is asked again where its last line is lost, which its logger does now and then.
    """
    from scripts.oracles.llamacpp import FINAL_ESTIMATE

    command = [str(prepared().perplexity_tool), "-m", str(file), "-f", str(text), "-c", str(n_ctx), "-t", "2"]
    command += ["--chunks", str(windows)] + ([] if batch is None else ["-b", str(batch)])
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
        if found := FINAL_ESTIMATE.search(done.stdout + done.stderr):
            return float(found[1]), float(found[2])
    raise AssertionError(f"no final estimate in 20 runs:\n{(done.stdout + done.stderr)[-2000:]}")


def kl_divergence(reference: Path, file: Path, text: Path, logits: Path, windows: int) -> dict[str, float]:
    """The statistics that llama-perplexity prints for a file against another one, by the names that it prints.

    Windows of 512 tokens, decoded one at a time. `logits` is where the log-probabilities of `reference` go; shares of
    probability are in percent, as printed. It is asked again where its last line is lost.
    """
    command = [
        str(prepared().perplexity_tool),
        "-c",
        "512",
        "-b",
        "512",
        "-t",
        "2",
        "--kl-divergence-base",
        str(logits),
    ]
    subprocess.run(
        [*command, "-m", str(reference), "-f", str(text), "--chunks", str(windows)], capture_output=True, check=True
    )
    for _ in range(20):
        done = subprocess.run(
            [*command, "-m", str(file), "--kl-divergence"],
            capture_output=True, encoding="utf-8", errors="replace", check=True,
        )  # fmt: skip
        printed = done.stdout + done.stderr
        found = {" ".join(name.split()): float(value) for name, value in STATISTIC.findall(printed)}
        if "Same top p" in found:
            return found
    raise AssertionError(f"no statistics in 20 runs:\n{printed[-2000:]}")
