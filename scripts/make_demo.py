"""Make the demo: a small but real Qwen3, its tokenizer, and a LoRA adapter trained on other text.

    python scripts/make_demo.py [DIR] [--force]

Writes DIR/base, DIR/adapter and DIR/demo.json (settings, sizes and the perplexities that were checked). The text is
what every Python carries, the topics of its built-in help. Takes under two minutes on two cores; on one machine, two
runs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_text import DemoText, Passage, split_topics

CHECKOUT = Path(__file__).resolve().parent.parent
VOCABULARY = 4096
THREADS = 2
BASE_STEPS, ADAPTER_STEPS = 200, 60
ROWS, LENGTH = 4, 256

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def say(text: str) -> None:
    """A line to stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def make_demo(directory: Path, *, force: bool = False) -> None:
    """Make the demo in `directory`, unless it is there and was made by this very script.

    Raises:
        SystemExit: the base has not learnt enough, or the adapter does not improve its own text.
    """
    stamp = hashlib.sha256(b"".join(Path(__file__).with_name(n).read_bytes() for n in ("make_demo.py", "demo_text.py")))
    facts_file = directory / "demo.json"
    if not force and facts_file.is_file() and json.loads(facts_file.read_text())["script"] == stamp.hexdigest():
        say(f"the demo is in {directory}")
        return
    import torch

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    work = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    started = time.monotonic()
    text = split_topics()
    tokenizer = make_tokenizer(text.base, work / "base")
    base, base_figures = train_base(tokenizer, text, work / "base")
    adapter_figures = train_adapter(base, tokenizer, text, work / "adapter")
    facts = {"script": stamp.hexdigest(), "vocabulary": VOCABULARY} | base_figures | adapter_figures
    (work / "demo.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    work.rename(directory)
    say(f"the demo is in {directory}, made in {time.monotonic() - started:.0f} s")


def make_tokenizer(passages: list[Passage], folder: Path) -> Any:
    """Train and save a byte-level BPE tokenizer with Qwen2's pipeline; returns it as transformers loads it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # Some rows stay without a token, as in a real Qwen, whose embedding is padded.
    size = VOCABULARY - 32 - len(SPECIAL) - len(ADDED)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([passage for _, passage in passages], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    loaded = AutoTokenizer.from_pretrained(folder)
    sample = "def f(x): return x ** 2\n\n\t中文 😀 12345 l'été <|im_start|>user\n<think>hm</think><|im_end|>"
    if loaded.encode(sample) != tokenizer.encode(sample).ids:
        raise SystemExit("the saved tokenizer gives other ids than the trained one")
    return loaded


def ask(passage: Passage) -> str:
    """A passage as a conversation in ChatML."""
    topic, text = passage
    question = f"What does Python's documentation say about {topic}?"
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"


def plain(passage: Passage) -> str:
    """A passage as a document."""
    return passage[1] + "<|endoftext|>"


def encode(tokenizer: Any, passages: Iterable[Passage], form: Callable[[Passage], str]) -> Any:
    """All passages as one int64 tensor of token ids."""
    import torch

    return torch.tensor([token for passage in passages for token in tokenizer.encode(form(passage))])


def train_base(tokenizer: Any, text: DemoText, folder: Path) -> tuple[Any, dict[str, float]]:
    """Train and save the base; every tenth passage is a conversation, so that the special tokens are learnt."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"training a Qwen3 of {parameters / 1e6:.1f} M parameters, {BASE_STEPS} steps")
    mixed = [(ask if index % 10 == 0 else plain)(passage) for index, passage in enumerate(text.base)]
    ids = torch.tensor([token for document in mixed for token in tokenizer.encode(document)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, ids, BASE_STEPS, [optimizer], seed=7)
    # What is saved is bf16, so that is what is measured and what the adapter is trained on.
    model.to(torch.bfloat16).float()
    figure = perplexity(model, encode(tokenizer, text.base_held_out, plain))
    limit = VOCABULARY / 5
    say(f"held-out perplexity of the base: {figure:.1f} (uniform: {VOCABULARY}, limit: {limit:.0f})")
    if not figure < limit:
        raise SystemExit(f"the base has a held-out perplexity of {figure:.1f}; expected below {limit:.0f}")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[end, pad], pad_token_id=pad
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return model.float(), {"parameters": parameters, "base_perplexity": figure}


def train_adapter(model: Any, tokenizer: Any, text: DemoText, folder: Path) -> dict[str, float]:
    """Train and save a LoRA on every linear layer with the adapter's own text."""
    import torch
    from peft import LoraConfig, get_peft_model

    held_out = encode(tokenizer, text.adapter_held_out, ask)
    before = perplexity(model, held_out)
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = "demo/base"
    say(f"training a LoRA adapter, {ADAPTER_STEPS} steps")
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    ids = encode(tokenizer, text.adapter, ask)
    train(tuned, ids, ADAPTER_STEPS, [torch.optim.AdamW(trained, lr=4e-3, weight_decay=0.0)], seed=8)
    after = perplexity(tuned, held_out)
    say(f"held-out perplexity of the adapter's text: {before:.1f} before, {after:.1f} after")
    if not after < 0.95 * before:
        raise SystemExit(f"the adapter brings its text from {before:.1f} to {after:.1f}; expected at least 5 % less")
    if any("lora_B" in name and not parameter.any() for name, parameter in tuned.named_parameters()):
        raise SystemExit("the adapter leaves a target as it was; expected an update of every one")
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return {"adapter_text_before": before, "adapter_text_after": after}


def train(model: Any, ids: Any, steps: int, optimizers: list[Any], seed: int) -> None:
    """Train on random windows; the rate warms up over a twentieth of the steps and falls to zero over the last 60 %."""
    import torch

    order, started = torch.Generator().manual_seed(seed), time.monotonic()
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / (0.05 * steps)) * min(1.0, (1 - step / steps) / 0.6)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        starts = torch.randint(0, len(ids) - LENGTH, (ROWS,), generator=order)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            say(f"  step {step + 1} of {steps}: loss {loss.item():.2f}, {left:.0f} s left")
    model.eval()


def perplexity(model: Any, ids: Any, window: int = 256) -> float:
    """Perplexity over windows that do not overlap, predictions of the second half of each scored."""
    import torch

    model.eval()
    count = len(ids) // window
    total, half = 0.0, window // 2
    with torch.inference_mode():
        for row in ids[: count * window].view(count, window):
            logits = model(input_ids=row[None]).logits[0, half:-1].float()
            total += torch.nn.functional.cross_entropy(logits, row[half + 1 :], reduction="sum").item()
    return math.exp(total / (count * (window - half - 1)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=CHECKOUT / ".cache" / "demo")
    parser.add_argument("--force", action="store_true", help="make it again")
    arguments = parser.parse_args()
    make_demo(arguments.directory, force=arguments.force)


if __name__ == "__main__":
    main()
