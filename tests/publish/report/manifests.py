"""Manifests of every kind that a report is made of, as `build_manifest` makes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from exporter.plan.gate_limits import Gate
from exporter.runtimes.base import TokenScores
from exporter.verify.gate import judge
from exporter.verify.results_json import verification_json
from exporter.verify.scores.metrics import Divergences, compare

Manifest = dict[str, Any]
HASH = "0" * 64


LENIENT = Gate(0.5, 0.2, 1.0, 1.0)


def verification(seed: int, noise: float, *, windows: int = 8, kl: bool = True, gate: Gate = LENIENT) -> dict[str, Any]:
    """Of an artifact whose log-probabilities are off by so much; with KL divergences, or those of the top 20."""
    generator = np.random.default_rng(seed)
    theirs = -generator.gamma(1.0, 2.0, (windows, 31))
    ours = np.minimum(theirs + generator.normal(0, noise, theirs.shape), 0.0)
    tops = generator.integers(0, 50, theirs.shape)
    artifact, reference = TokenScores(ours, np.where(ours < theirs - noise, tops + 1, tops)), TokenScores(theirs, tops)
    far = (ours - theirs) ** 2
    divergences = Divergences(kl=far, jensen_shannon=far / 9) if kl else Divergences(top_k=far / 2, k=20)
    verdict = judge("llama-cpp-python 1.2", compare(artifact, reference, divergences), gate)
    found: dict[str, Any] = json.loads(json.dumps(verification_json(verdict)))
    return found


def _figures(error: float, survival: float | None) -> dict[str, Any]:
    return {"relative_error": error, "survival": survival, "delta_error": survival and 7 * error}


def _nearest(name: str, value: float, limit: float, *place: int) -> dict[str, Any]:
    row, column, *_ = (*place, None, None)
    weight = f"model.layers.1.{name}.weight"
    return {"name": weight, "type": "Q4_K", "value": value, "limit": limit, "row": row, "column": column}


WEIGHTS: dict[str, Any] = {
    "relative_error": 0.0671234,
    "survival": 0.9964,
    "survival_stderr": 0.00024,
    "survival_limit": 0.0213,
    "delta_error": 0.42,
    "checksums": {"compared": 310, "different": ["model.layers.1.mlp.up_proj.weight"]},
    "judged": 28,
    "worst": [
        {"name": "model.layers.1.mlp.up_proj.weight", "type": "Q4_K", "relative_error": 0.08, "limit": 0.19},
        {"name": "model.layers.0.mlp.down_proj.weight", "type": "Q6_K", "relative_error": 0.02, "limit": 0.05},
        {"name": "model.layers.1.self_attn.k_proj.weight", "type": "Q4_K", "relative_error": 0.07, "limit": 0.19},
    ],
    "nearest": {
        "relative_error": _nearest("mlp.up_proj", 0.08, 0.19),
        "group": _nearest("self_attn.k_proj", 0.31, 0.6, 12, 64),
        "scale": _nearest("self_attn.k_proj", 0.05, 0.23, 1012, 0),
        "row_mean": _nearest("mlp.down_proj", 0.01, 0.095, 7),
        "survival": _nearest("mlp.down_proj", 0.004, 0.03),
    },
    "layers": {str(layer): _figures(0.06 + layer / 1000, 0.996 - layer / 5000) for layer in range(36)},
    "kinds": {"norm": _figures(0.0, None), "q_proj": _figures(0.07, 0.995), "up_proj": _figures(0.08, 1.002)},
    "broken": [],
}
ANSWERS: dict[str, Any] = {
    "tokenization": {"texts": 104, "differing": [], "explained": {"decomposed": "the runtime does not normalize"}},
    "chat_template": {"conversations": 8, "differing": []},
    "stop": {
        "sources": {"config": [62], "generation_config": [62, 60], "tokenizer": [62], "template": [62]},
        "end_of_turn": 62, "stops": True, "evidence": "vocabulary", "ignored": [60],
    },
    "continuations": [
        {
            "prompt": "short", "prompt_tokens": 10, "tokens": 32, "followed": 32, "stopped": False, "loop": 3,
            "diverges_at": 1, "margin": 0.06, "mean_shortfall": 0.00197, "largest_shortfall": 0.0631,
        },
        {
            "prompt": "long", "prompt_tokens": 2000, "tokens": 13, "followed": 1, "stopped": True, "loop": None,
            "diverges_at": None, "margin": None, "mean_shortfall": None, "largest_shortfall": None,
        },
    ],
    "max_shortfall": 1.5,
    "broken": [],
}  # fmt: skip
QUANTIZATION: dict[str, Any] = {
    "matrices": 28,
    "rounded": ["model.layers.0.mlp.experts.3.up_proj.weight"],
    "damped_more": {"model.layers.1.self_attn.q_proj.weight": 0.1},
    "dead_columns": 4,
    "losses": {f"model.layers.{layer}.self_attn.q_proj.weight": 0.001 * layer for layer in range(12)},
    "tokens": {f"model.layers.{layer}.self_attn.q_proj.weight": 16384 for layer in range(12)},
}


def artifact(quant: str, seed: int, noise: float) -> dict[str, Any]:
    return {
        "format": "gguf",
        "quant": quant,
        "entry": f"model-{quant}.gguf",
        "runtimes": ["llamacpp"],
        "bytes": 2_940_128,
        "files": [f"model-{quant}.gguf"],
        "types": {
            "Q4_K": {"tensors": 24, "bytes": 1_511_424, "share": 0.9926},
            "F32": {"tensors": 17, "bytes": 11_264, "share": 0.0074},
        },
        "notes": ["an importance matrix was measured"],
        "tensors": [
            {"name": f"blk.{layer}.attn_q.weight", "type": "Q5_0", "shape": [64, 96], "wanted": "Q4_K"}
            for layer in range(3)
        ],
        "checksums": {"model.norm.weight": "0badf00d"},
        "quantization": None,
        "weights": copy.deepcopy(WEIGHTS),
        "verification": verification(seed, noise),
        "answers": copy.deepcopy(ANSWERS),
    }


def manifest() -> Manifest:
    """Two artifacts of one folder, with everything."""
    file = {"name": "config.json", "bytes": 879, "sha256": HASH}
    adapter = {"method": "lora", "ranks": [8], "scales": [2.0], "targets": 28, "modules": ["q_proj", "up_proj"]}
    return {
        "schema_version": 1,
        "exporter": "0.1.0",
        "name": "model",
        "inputs": [
            {"role": "base", "name": "base", "hub_id": "org/base", "revision": "abc", "files": [file]},
            {"role": "adapter", "name": "lora", "adapter": adapter, "files": [file]},
        ],
        "recipe": {
            "base": "org/base", "adapters": ["lora"], "format": "gguf", "quant": ["Q4_K_M", "Q8_0"],
            "options": {"imatrix": "computed"}, "verify": True, "compute_dtype": "float32",
            "calibration": {"text": None, "tokens": 16384, "window": 1024, "seed": 0},
            "evaluation": {"tokens": 512, "max_tokens": 2048, "n_ctx": 64, "gate": {}, "answers": True},
        },
        "merge": {
            "device": "cpu", "parameters": 4_197_120, "tensors": 46, "tensors_updated": 28, "untied": True,
            "tokenizer_from": "base",
        },
        "versions": {"torch": "2.13.0", "gguf": "0.19.0"},
        "evaluation": {
            "source": "embedded", "windows": 8, "n_ctx": 64, "tokens_scored": 248, "sha256": HASH,
            "drawn": None,
        },
        "calibration": {
            "source": "embedded", "windows": 16, "window": 1024, "tokens": 16384, "seed": 0, "sha256": HASH,
        },
        "artifacts": [artifact("Q4_K_M", 1, 0.1), artifact("Q8_0", 2, 0.01)],
        "files": {name: {"bytes": 12_345, "sha256": HASH} for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf")},
    }  # fmt: skip


def _one_window(found: Manifest) -> None:
    found["evaluation"] |= {"windows": 1, "tokens_scored": 31}
    for one in found["artifacts"]:
        one["verification"] = verification(1, 0.1, windows=1)


def _without_kl(found: Manifest) -> None:
    found["artifacts"][0]["verification"] = verification(1, 0.1, kl=False)


def _without(part: str) -> Callable[[Manifest], None]:
    def change(found: Manifest) -> None:
        found["artifacts"][0][part] = None

    return change


def _unverified(found: Manifest) -> None:
    found["evaluation"], found["recipe"]["verify"] = None, False
    for one in found["artifacts"]:
        one |= {"verification": {"verdict": "skipped"}, "weights": None, "answers": None}


def _failed(found: Manifest) -> None:
    one = found["artifacts"][1]
    one["verification"] = verification(2, 2.0, gate=Gate(0.01, 0.99))
    one["weights"] |= {"relative_error": None, "survival": 0.01, "broken": ["q_proj: of the change 1% is stored"]}
    one["weights"]["layers"]["3"] = {"relative_error": None, "survival": None, "delta_error": None}
    one["weights"]["kinds"]["q_proj"] = {"relative_error": None, "survival": None, "delta_error": None}
    one["answers"] |= {"broken": ["tokenization differs on 1 of 104 texts: greek"]}
    one["answers"]["tokenization"]["differing"] = ["greek"]
    one["verification"]["broken"] += one["weights"]["broken"] + one["answers"]["broken"]


def _not_scored(found: Manifest) -> None:
    """One that its runtime cannot load, whose weights are cut off."""
    one = found["artifacts"][1]
    one["weights"]["broken"] = ["blk.1.ffn_up.weight is cut off: 32 bytes are missing in model-Q8_0.gguf"]
    reason = "not scored in llamacpp: found llama.cpp could not load it: no; expected a file that llama.cpp serves"
    kept = {key: one["verification"][key] for key in ("runtime", "gate")}
    one["verification"] = kept | {
        "verdict": "failed", "not_scored": reason, "broken": [*one["weights"]["broken"], reason]
    }  # fmt: skip
    one["answers"] = None


def _no_adapter(found: Manifest) -> None:
    del found["inputs"][1]
    weights = found["artifacts"][0]["weights"]
    weights |= {"survival": None, "survival_stderr": None, "survival_limit": None, "delta_error": None}
    for part in ("layers", "kinds"):
        weights[part] = {name: one | {"survival": None, "delta_error": None} for name, one in weights[part].items()}


def _gptq(found: Manifest) -> None:
    del found["artifacts"][1]
    found["artifacts"][0] |= {
        "format": "gptq", "quant": "gptq-int4-g128", "entry": ".", "runtimes": ["vllm", "transformers"],
        "quantization": QUANTIZATION,
    }  # fmt: skip


def _limit_of_zero(found: Manifest) -> None:
    found["artifacts"][0]["verification"] = verification(1, 0.1, gate=Gate(0.0, 0.0))


def checks(found: dict[str, Any], *verdicts: str) -> list[dict[str, Any]]:
    """The gate's checks of a verification, with these verdicts: perplexity, KL divergence, same top token."""
    kl = found["kl_divergence"]["mean"]
    rows = (
        ("perplexity", found["delta"], [found["delta"] - 0.01, found["delta"] + 0.02], 0.4, "within"),
        ("kl_divergence", kl, [kl * 0.9, kl * 1.2], kl * 1.1, "at_most"),
        ("same_top", found["same_top"], None, 0.25, "at_least"),
    )
    keys = ("name", "value", "interval", "limit", "kind", "verdict")
    return [dict(zip(keys, (*row, verdict), strict=True)) for row, verdict in zip(rows, verdicts, strict=True)]


def _no_error(found: Manifest) -> None:
    """Windows that are all alike."""
    found["artifacts"][0]["verification"] |= {"same_top_stderr": 0.0, "delta": 0.0, "delta_interval": [0.0, 0.0]}
    found["artifacts"][0]["weights"]["survival_stderr"] = 0.0


def _undecided(found: Manifest) -> None:
    one = found["artifacts"][0]["verification"]
    one |= {"verdict": "undecided", "looks": [124, 248], "checks": checks(one, "passed", "undecided", "passed")}
    one["broken"] = ["the KL divergence is 0.1000 nats, the limit is 0.1100 nats: undecided"]


CASES: dict[str, Callable[[Manifest], None]] = {
    "everything": lambda _: None,
    "one window": _one_window,
    "without KL": _without_kl,
    "without weights": _without("weights"),
    "without answers": _without("answers"),
    "unverified": _unverified,
    "failed": _failed,
    "undecided": _undecided,
    "not scored": _not_scored,
    "no adapter": _no_adapter,
    "gptq": _gptq,
    "a limit of zero": _limit_of_zero,
    "no error": _no_error,
}


def case(name: str) -> Manifest:
    found = manifest()
    CASES[name](found)
    return found
