"""A model folder of a real shape with random weights: time and memory at sizes that nobody wants to download.

    python -m scripts.benchmarks.make_random_model DIR --shape qwen1.5-14b --adapter DIR2 --rank 16 \\
        --tokenizer-from OTHER

The config is the shape's own, the weights are bf16 (one block of normal numbers, begun at another place for each
tensor: fast, and in little memory), in shards with an index. The adapter is in peft's format: float32, every linear of
every layer, B small but not zero. Neither says anything sensible. The same arguments make the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHARD_BYTES = 4_900_000_000
WEIGHT_STD = 0.02
BLOCK_ELEMENTS = 1 << 23
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
Bits = npt.NDArray[np.uint16]
Parts = Callable[[str], Iterator[npt.NDArray[np.generic]]]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as its published config.json has them."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    positions: int
    window_layers: int
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden // self.heads


SHAPES = {
    "qwen1.5-14b": Shape("qwen2", 5120, 13696, 40, 40, 40, 152064, False, 32768, 35),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151936, True, 32768, 24),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 131072, 28),
    "qwen2.5-14b": Shape("qwen2", 5120, 13824, 48, 40, 8, 152064, False, 131072, 48),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 151936, True, 40960, 28, 128),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 151936, False, 40960, 36, 128),
}


def config(shape: Shape) -> dict[str, object]:
    """The config.json of a shape."""
    qwen3 = shape.model_type == "qwen3"
    extra: dict[str, object] = {"head_dim": shape.head_dim, "attention_bias": False} if qwen3 else {}
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645 if qwen3 else 151643,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "max_window_layers": shape.window_layers,
        "model_type": shape.model_type,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
        **extra,
    }


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """The linears of one layer: name → (out_features, in_features)."""
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return {
        "self_attn.q_proj": (query, shape.hidden),
        "self_attn.k_proj": (key, shape.hidden),
        "self_attn.v_proj": (key, shape.hidden),
        "self_attn.o_proj": (shape.hidden, query),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in model order."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in linears(shape).items():
            found[f"{prefix}{name}.weight"] = (rows, columns)
            if shape.model_type == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                found[f"{prefix}{name}.bias"] = (rows,)
        if shape.model_type == "qwen3":
            found |= {f"{prefix}self_attn.{name}.weight": (shape.head_size,) for name in ("q_norm", "k_norm")}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = (shape.hidden,)
    found["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab, shape.hidden)
    return found


def shards(tensors: Mapping[str, tuple[int, ...]], limit: int = SHARD_BYTES) -> list[dict[str, tuple[int, ...]]]:
    """Tensors distributed over shards in model order, none with more than `limit` bytes of bf16."""
    found: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * elements(shape)
        if found[-1] and size + nbytes > limit:
            found.append({})
            size = 0
        found[-1][name] = shape
        size += nbytes
    return found


def elements(shape: tuple[int, ...]) -> int:
    """How many elements a tensor of this shape has."""
    return int(np.prod(shape, dtype=np.int64))


def random_block(seed: int) -> Bits:
    """Normal numbers with the weights' spread, as bf16 bits (upper halves of float32, rounded to nearest even)."""
    values = np.random.default_rng(seed).standard_normal(BLOCK_ELEMENTS, dtype=np.float32) * np.float32(WEIGHT_STD)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def weight_bits(name: str, count: int, block: Bits) -> Iterator[Bits]:
    """The elements of one tensor as bf16 bits: ones for a norm, else the block from places that the name decides."""
    if "norm" in name:
        yield np.full(count, 0x3F80, dtype=np.uint16)
        return
    places = random.Random(name)
    while count:
        start = places.randrange(BLOCK_ELEMENTS // 2)
        part = block[start : start + count]
        count -= len(part)
        yield part


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, parts: Parts) -> None:
    """Write one safetensors file, with tensors in order of name, from the parts that `parts(name)` yields."""
    width = {"BF16": 2, "F32": 4}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        end = offset + width * elements(tensors[name])
        header[name] = {"dtype": dtype, "shape": list(tensors[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as data:
        data.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            for part in parts(name):
                part.tofile(data)


def write_model(directory: Path, shape: Shape, seed: int) -> int:
    """Write config, shards and index. Returns the bytes of all tensors."""
    block = random_block(seed)
    tensors = tensor_shapes(shape)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n", encoding="utf-8")
    parts = shards(tensors)
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        where |= dict.fromkeys(part, name)
        print(f"{name}: {len(part)} tensors", file=sys.stderr, flush=True)
        write_safetensors(directory / name, part, "BF16", lambda key: weight_bits(key, elements(tensors[key]), block))
    total = sum(2 * elements(found) for found in tensors.values())
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def write_adapter(directory: Path, base: Path, shape: Shape, rank: int, seed: int) -> None:
    """Write a LoRA adapter for every linear of every layer, in peft's file format."""
    directory.mkdir(parents=True)
    settings = {
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in linears(shape)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in linears(shape).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{prefix}.lora_A.weight": (rank, columns), f"{prefix}.lora_B.weight": (rows, rank)}

    def parts(name: str) -> Iterator[npt.NDArray[np.generic]]:
        numbers = np.random.default_rng([seed, *name.encode()])
        # A as peft initializes it; B such that the delta is about a hundredth of the weights.
        bound = tensors[name][1] ** -0.5 if "lora_A" in name else 0.005
        yield numbers.uniform(-bound, bound, elements(tensors[name])).astype(np.float32)

    write_safetensors(directory / "adapter_model.safetensors", tensors, "F32", parts)


def main() -> int:
    """Make the model, and the adapter where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder to make")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen1.5-14b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick try")
    parser.add_argument("--tokenizer-from", type=Path, metavar="DIR", help="model folder whose tokenizer is copied")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="also make a random adapter for it, here")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        shape = Shape(**{**vars(shape), "layers": args.layers})
    total = write_model(args.directory, shape, args.seed)
    if args.tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            if (args.tokenizer_from / name).is_file():
                shutil.copyfile(args.tokenizer_from / name, args.directory / name)
    if args.adapter is not None:
        write_adapter(args.adapter, args.directory, shape, args.rank, args.seed)
    print(f"{total / 1e9:.2f} GB of weights, {len(tensor_shapes(shape))} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
