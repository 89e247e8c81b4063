"""Make the demo: a small but real Qwen3, its tokenizer, and a LoRA adapter trained on other text.

    python -m scripts.demo.make_demo [DIR] [--force]

Writes DIR/base, DIR/adapter and DIR/demo.json (sizes, and the perplexities that were checked). The text is what every
Python carries, the topics of its built-in help. Takes under two minutes on two cores; on one machine, two runs give
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.demo.text import DemoText, Passage, split_topics

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = ("make_demo.py", "text.py", "training.py")
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")

VOCABULARY = 4096
# Rows of the embedding that no token has, as in a real Qwen, whose embedding is padded.
PADDING = 29
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
# The pattern of Qwen2's pre-tokenizer, as in transformers' tokenization_qwen2.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
MIXED_TEXT = (
    "def f(x):\r\n\treturn x ** 2  \n\nl'e\u0301te\u0301, I'LL go 1234567 中文字符 \U0001f600\U0001f469\u200d\U0001f52c"
    " <|im_start|>user\n<think>hm</think><tool_call> <|im_end|><|endoftext|>"
)

RANK, ALPHA = 8, 16
# Every tenth passage of the base's text is a conversation, or its <|im_end|> would be as untrained as its padding.
CONVERSATION_EVERY = 10
BASE_PERPLEXITY_LIMIT = VOCABULARY / 16
ADAPTER_RATIO_LIMIT = 0.90


def say(text: str) -> None:
    """A line to stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def make_demo(directory: Path, *, force: bool = False) -> None:
    """Make the demo in `directory`, unless it is there and this very script made it from this very text.

    Raises:
        SystemExit: `directory` is something else, the base has not learnt enough, or the adapter improves too little.
    """
    facts_file, expected = directory / "demo.json", settings_hash()
    if directory.exists() and any(directory.iterdir()) and not facts_file.is_file():
        raise SystemExit(f"{directory} has no demo.json; expected a demo, or a folder that does not exist")
    if not force and facts_file.is_file() and json.loads(facts_file.read_text()).get("settings") == expected:
        # Newer than the script, so that make does not come back for it.
        facts_file.touch()
        say(f"the demo is in {directory}; nothing to do (--force makes it again)")
        return
    started = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        work.chmod(0o755)
        facts = {"settings": expected} | write_models(work)
        (work / "demo.json").write_text(json.dumps(facts, indent=2) + "\n")
        if directory.exists():
            os.replace(directory, work / "replaced")
        shutil.rmtree(work / "replaced", ignore_errors=True)
        os.replace(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"the demo is in {directory}, made in {time.monotonic() - started:.0f} s")


def settings_hash() -> str:
    """SHA-256 of all that decides the bytes: these scripts, the text, and the packages' versions."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    digest.update(repr(split_topics()).encode())
    digest.update(repr([version(package) for package in PACKAGES]).encode())
    return digest.hexdigest()


def write_models(work: Path) -> dict[str, float]:
    """Train and write all there is to the demo; returns the figures for demo.json."""
    # Before transformers draws it as a bar among the plain lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch

    from scripts.demo.training import workers

    text = split_topics()
    with workers() as pool, torch.random.fork_rng(devices=[]):
        tokenizer = make_tokenizer(text.base, work / "base")
        base, base_figures = train_base(tokenizer, text, work / "base", pool)
        adapter_figures = train_adapter(base, tokenizer, text, work / "adapter", pool)
    sizes = {"vocabulary": VOCABULARY, "tokens": len(tokenizer)}
    return sizes | base_figures | adapter_figures


def make_tokenizer(passages: Iterable[Passage], folder: Path) -> Any:
    """Train and save a byte-level BPE tokenizer with Qwen2's pipeline; returns it as transformers loads it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # As in Qwen's, the added tokens come after the trained ones.
    size = VOCABULARY - PADDING - len(SPECIAL) - len(ADDED)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([passage for _, passage in passages], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    write_tokenizer(tokenizer, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    found, expected = loaded.encode(MIXED_TEXT), tokenizer.encode(MIXED_TEXT).ids
    if found != expected:
        raise SystemExit(f"the saved tokenizer gives {found}; expected what the trained one gives, {expected}")
    return loaded


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The files that a Qwen has; transformers' own writer leaves out `add_bos_token`."""
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": token in SPECIAL,
            }
            for token in SPECIAL + ADDED
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode(tokenizer: Any, documents: Iterable[str]) -> Any:
    """All documents as one stream, an int64 tensor of token ids."""
    import torch

    return torch.tensor([token for document in documents for token in tokenizer.encode(document)])


def plain(passage: Passage) -> str:
    """A passage as a document."""
    return passage[1] + "<|endoftext|>"


def conversation(tokenizer: Any) -> Callable[[Passage], str]:
    """A function that makes a passage the answer to a question, by the tokenizer's chat template."""

    def form(passage: Passage) -> str:
        topic, text = passage
        question = {"role": "user", "content": f"What does Python's documentation say about {topic}?"}
        answer = {"role": "assistant", "content": text}
        return str(tokenizer.apply_chat_template([question, answer], tokenize=False))

    return form


def train_base(tokenizer: Any, text: DemoText, folder: Path, pool: ThreadPoolExecutor) -> tuple[Any, dict[str, float]]:
    """Train, check and save the base; returns it in float32, as saved, and its figures."""
    import torch
    from transformers import Qwen3ForCausalLM

    from scripts.demo.training import Phase, base_optimizers, perplexity, train

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(base_config(tokenizer))
    parameters = model.num_parameters()
    say(f"training a Qwen3 of {parameters / 1e6:.1f} M parameters")
    ask = conversation(tokenizer)
    mixed = [(plain if n % CONVERSATION_EVERY else ask)(passage) for n, passage in enumerate(text.base)]
    # Short windows are cheaper and teach the words; the longer ones then teach to look back.
    phases = [Phase(75, rows=8, length=128), Phase(75, rows=4, length=256)]
    train(model, encode(tokenizer, mixed), phases, base_optimizers(model), pool, say)
    # What is saved is bf16, so that is what is measured and what the adapter is trained on.
    model.to(torch.bfloat16).float()
    found = perplexity(model, encode(tokenizer, map(plain, text.base_held_out)), pool)
    say(f"held-out perplexity of the base: {found:.1f} (expected: below {BASE_PERPLEXITY_LIMIT:.0f})")
    if not found < BASE_PERPLEXITY_LIMIT:
        raise SystemExit(
            f"the base has a held-out perplexity of {found:.1f}; expected below {BASE_PERPLEXITY_LIMIT:.0f}"
        )
    model.generation_config = sampling(tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    return model.float(), {"parameters": parameters, "base_perplexity": round(found, 4)}


def base_config(tokenizer: Any) -> Any:
    """A Qwen3 with all that a real one has, in small; hidden 256, so that K-quants apply."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
        # Qwen's theta, not transformers' default: a reader that forgets it is found out.
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        # No pad_token_id, as in Qwen's: transformers would keep that token's embedding from learning.
        bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )  # fmt: skip


def sampling(tokenizer: Any) -> Any:
    """The generation_config.json: the defaults that Qwen publishes with its instruct models."""
    from transformers import GenerationConfig

    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[end, pad], pad_token_id=pad
    )


def train_adapter(
    model: Any, tokenizer: Any, text: DemoText, folder: Path, pool: ThreadPoolExecutor
) -> dict[str, float]:
    """Train, check and save a LoRA on every linear layer, with the adapter's own text."""
    import torch
    from peft import LoraConfig, get_peft_model

    from scripts.demo.training import Phase, perplexity, train

    ask = conversation(tokenizer)
    held_out = encode(tokenizer, map(ask, text.adapter_held_out))
    before = perplexity(model, held_out, pool)
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its former name.
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, config)
    say("training a LoRA adapter")
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=6e-3, weight_decay=0.0)
    train(tuned, encode(tokenizer, map(ask, text.adapter)), [Phase(60, rows=4, length=256)], [optimizer], pool, say)
    after = perplexity(tuned, held_out, pool)
    say(f"held-out perplexity of the adapter's text: {before:.1f} without, {after:.1f} with it")
    if not after < ADAPTER_RATIO_LIMIT * before:
        wanted = ADAPTER_RATIO_LIMIT * before
        raise SystemExit(f"the adapter brings its text's perplexity to {after:.1f}; expected below {wanted:.1f}")
    ratios = delta_ratios(tuned)
    smallest = min(ratios, key=lambda name: ratios[name])
    say(f"‖Δ‖/‖W‖ from {ratios[smallest]:.3f} ({smallest}) to {max(ratios.values()):.3f}")
    if not ratios[smallest] > 0:
        raise SystemExit(f"the adapter's update of {smallest} is zero; expected an update of every linear layer")
    save_adapter(tuned, folder)
    mean = sum(ratios.values()) / len(ratios)
    return {
        "adapter_text_before": round(before, 4), "adapter_text_after": round(after, 4), "adapter_targets": len(ratios),
        "delta_ratio_least": round(ratios[smallest], 6), "delta_ratio_mean": round(mean, 6),
        "delta_ratio_most": round(max(ratios.values()), 6),
    }  # fmt: skip


def delta_ratios(tuned: Any) -> dict[str, float]:
    """‖Δ‖/‖W‖ of every target, by its name in the base."""
    ratios = {}
    for name, module in tuned.base_model.model.named_modules():
        if hasattr(module, "lora_B"):
            delta = module.get_delta_weight("default").detach()
            ratios[name] = float(delta.norm() / module.base_layer.weight.norm())
    return ratios


def save_adapter(tuned: Any, folder: Path) -> None:
    """In peft's format, without what differs from run to run: it writes the set of targets in any order."""
    # Not "auto", which would ask the Hub about a base that is nowhere but here.
    tuned.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path, nargs="?", default=CHECKOUT / ".cache" / "demo")
    parser.add_argument("--force", action="store_true", help="make it again, though it is there")
    arguments = parser.parse_args()
    make_demo(arguments.directory, force=arguments.force)


if __name__ == "__main__":
    main()
