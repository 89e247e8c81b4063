"""Small models for tests: random weights, a tokenizer of a few hundred tokens, and random adapters by peft itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, size: int = 384) -> int:
    """Save a byte-level BPE tokenizer with Qwen2's pre-tokenizer; returns its number of tokens."""
    from pydoc_data.topics import topics

    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([topics["assignment"], topics["class"]], trainer)
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return len(fast)


def make_base(
    folder: Path,
    family: str = "qwen3",
    *,
    tied: bool = True,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    padding: int = 16,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a small model of a family with random weights; its embedding has `padding` rows more than the tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    tokens = make_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": tokens + padding,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        # The tokenizer's eos, and what ends a turn in its chat template: the last token.
        "eos_token_id": tokens - 1,
        "bos_token_id": None,
    }
    if family == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(head_dim=head_dim, **settings, **config))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**settings, **config))
    with torch.no_grad():
        # Norms and biases start at one and zero, which would hide a fault in them.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "proj" in name:
                parameter.mul_(3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_adapter(
    base: Path, folder: Path, *, seed: int = 1, scale: float = 0.05, dtype: str = "float32", **config: Any
) -> Path:
    """Save a random LoRA adapter for a base, through peft; every B is nonzero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(scale * torch.randn_like(parameter))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
