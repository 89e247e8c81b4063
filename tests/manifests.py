"""Manifests made by hand, with the figures of a run on the demo."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

_SPREAD = {"median": 0.002, "p90": 0.006, "p95": 0.008, "p99": 0.014, "largest": 0.043}
_SCORES: dict[str, dict[str, Any]] = {
    "Q4_K_M": {
        "perplexity": 68.3063, "delta": 0.00785, "delta_interval": [0.00297, 0.01275], "same_top": 0.9431,
        "kl_divergence": {"mean": 0.002848, "stderr": 0.00014, **_SPREAD},
    },
    "Q8_0": {
        "perplexity": 67.7628, "delta": -0.00017, "delta_interval": [-0.00103, 0.00069], "same_top": 0.9873,
        "kl_divergence": {"mean": 7.53e-05, "stderr": 1.5e-06, **_SPREAD},
    },
}  # fmt: skip
_TYPES = {"gguf": "Q4_K", "safetensors": "BF16"}
_BYTES = {"Q4_K_M": 2_898_816, "Q8_0": 4_607_264}


def manifest_of(
    *, name: str = "demo", format_: str = "gguf", quants: Sequence[str] = ("Q4_K_M",), tokens: str = "0" * 64
) -> dict[str, Any]:
    """An `export.json` of base + adapter, verified and passed.

    Args:
        name: the model's.
        format_: the backend; of a model folder there is one artifact.
        quants: of the types whose figures are known here.
        tokens: hash of the evaluation tokens.
    """
    artifacts = [_artifact(name, format_, quant) for quant in quants]
    files = {file: {"bytes": a["bytes"], "sha256": "0" * 64} for a in artifacts for file in a["files"]}
    inputs = [{"name": "config.json", "bytes": 1, "sha256": "0" * 64}]
    summary = {"method": "lora", "ranks": [8], "scales": [2.0], "targets": 28, "modules": ["q_proj"]}
    return copy.deepcopy(
        {
            "schema_version": 1,
            "exporter": "0.1.0",
            "name": name,
            "inputs": [
                {"role": "base", "name": "base", "files": inputs},
                {"role": "adapter", "name": "adapter", "adapter": summary, "files": inputs},
            ],
            "recipe": {
                "base": "base", "adapters": ["adapter"], "format": format_, "quant": list(quants), "options": {},
                "verify": True, "compute_dtype": "float32",
                "calibration": {"text": None, "tokens": 16384, "window": 1024, "seed": 0},
                "evaluation": {"tokens": 4096, "n_ctx": 512, "gate": {}, "answers": True},
            },
            "merge": {
                "device": "cpu", "parameters": 4197120, "tensors": 46, "tensors_updated": 28, "untied": False,
                "tokenizer_from": "base",
            },
            "versions": {"torch": "2.13.0", "llama-cpp-python": "0.3.36"},
            "evaluation": {
                "source": "embedded", "windows": 8, "n_ctx": 512, "tokens_scored": 2040, "sha256": tokens,
            },
            "calibration": None,
            "artifacts": artifacts,
            "files": files,
        }
    )  # fmt: skip


def _artifact(name: str, format_: str, quant: str) -> dict[str, Any]:
    gguf = format_ == "gguf"
    file = f"{name}-{quant}.gguf" if gguf else "model.safetensors"
    return {
        "format": format_,
        "quant": quant,
        "entry": file if gguf else ".",
        "runtimes": ["llamacpp"] if gguf else ["vllm", "transformers"],
        "bytes": _BYTES[quant],
        "files": [file],
        "types": {_TYPES.get(format_, "I32"): {"tensors": 46, "bytes": _BYTES[quant], "share": 1.0}},
        "notes": [],
        "tensors": [],
        "checksums": {},
        "quantization": None,
        "weights": {"survival": 0.9964, "survival_stderr": 0.0002, "broken": []},
        "verification": {
            "verdict": "passed", "runtime": "llama-cpp-python 0.3.36", "tokens_scored": 2040,
            "reference_perplexity": 67.7744, "top_k_divergence": None, "broken": [], **_SCORES[quant],
        },
        "answers": None,
    }  # fmt: skip
