"""The demo: what it promises to the tests and to the user who has no model at hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer, Qwen3ForCausalLM

from scripts.demo import make_demo

LAYERS = 4
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")


def read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script itself; it imports neither torch nor transformers until it trains."""
    return make_demo


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo / "base")


@pytest.fixture(scope="module")
def base(demo: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float32)


def test_config_has_what_a_real_qwen3_has(demo: Path) -> None:
    config = read_json(demo / "base" / "config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["hidden_size"] == 256
    assert config["intermediate_size"] % 256 == 0
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] > config["num_key_value_heads"] >= 2
    assert config["num_hidden_layers"] == LAYERS
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["rope_theta"] == 1_000_000


def test_tensors_are_a_tied_qwen3s_in_bf16(demo: Path) -> None:
    tensors = load_file(demo / "base" / "model.safetensors")
    layer = {f"{linear}.weight" for linear in LINEARS}
    layer |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected = {f"model.layers.{index}.{name}" for index in range(LAYERS) for name in layer}
    assert set(tensors) == expected | {"model.embed_tokens.weight", "model.norm.weight"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    facts = read_json(demo / "demo.json")
    assert sum(tensor.numel() for tensor in tensors.values()) == facts["parameters"]


def test_base_loads_in_transformers(base: Any) -> None:
    assert isinstance(base, Qwen3ForCausalLM)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base(torch.arange(16)[None]).logits.shape == (1, 16, 4096)


def test_tokenizer_is_qwen2s(demo: Path, tokenizer: Any) -> None:
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    config = read_json(demo / "base" / "tokenizer_config.json")
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    assert config["add_bos_token"] is False
    pipeline = read_json(demo / "base" / "tokenizer.json")
    assert pipeline["normalizer"] == {"type": "NFC"}
    split, byte_level = pipeline["pre_tokenizer"]["pretokenizers"]
    assert (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)
    assert (pipeline["decoder"]["type"], pipeline["post_processor"]["type"]) == ("ByteLevel", "ByteLevel")


def test_embedding_is_padded_and_added_tokens_come_last(demo: Path, tokenizer: Any) -> None:
    facts = read_json(demo / "demo.json")
    assert facts["tokens"] == len(tokenizer) < facts["vocabulary"]
    assert facts["vocabulary"] % 64 == 0
    ids = tokenizer.convert_tokens_to_ids(list(ADDED))
    assert ids == list(range(len(tokenizer) - len(ADDED), len(tokenizer)))
    added = tokenizer.added_tokens_decoder
    assert [added[token_id].special for token_id in ids] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a\r\n\r\n  b\t",
        "1234567 + 0x7f",
        "中文字符。",
        "\U0001f600\U0001f469\u200d\U0001f52c",
        "I'll don't WE'RE",
    ],
)
def test_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_digits_are_single_tokens_and_special_tokens_are_parsed(tokenizer: Any) -> None:
    assert len(tokenizer.encode("1234567")) == 7
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.encode("a<|im_end|>b").count(end) == 1


def test_chat_template_is_chatml(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "  Hi\n"},
    ]
    expected = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n  Hi\n<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_all_configs_agree_on_the_end(demo: Path, tokenizer: Any) -> None:
    config, generation = (read_json(demo / "base" / name) for name in ("config.json", "generation_config.json"))
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert config["eos_token_id"] == end
    assert generation["eos_token_id"] == [end, pad]
    assert generation["pad_token_id"] == pad
    assert generation["do_sample"] is True


def test_recorded_perplexities_are_within_the_limits(demo: Path) -> None:
    facts = read_json(demo / "demo.json")
    assert 1 < facts["base_perplexity"] < facts["vocabulary"] / 16
    assert 1 < facts["adapter_text_after"] < 0.9 * facts["adapter_text_before"]


def test_adapter_changes_every_linear_layer(demo: Path) -> None:
    config = read_json(demo / "adapter" / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = load_file(demo / "adapter" / "adapter_model.safetensors")
    targets = [f"base_model.model.model.layers.{index}.{linear}" for index in range(LAYERS) for linear in LINEARS]
    assert set(tensors) == {f"{target}.lora_{side}.weight" for target in targets for side in "AB"}
    assert all(tensors[f"{target}.lora_B.weight"].any() for target in targets)
    facts = read_json(demo / "demo.json")
    assert facts["adapter_targets"] == len(targets)
    assert 1e-3 < facts["delta_ratio_least"] <= facts["delta_ratio_mean"] <= facts["delta_ratio_most"] < 1


def test_adapter_loads_in_peft_and_improves_its_own_text(demo: Path, script: ModuleType, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float32)
    ask = script.conversation(tokenizer)
    held_out = script.encode(tokenizer, map(ask, script.split_topics().adapter_held_out))[None, :512]
    with torch.inference_mode():
        before = float(model(held_out, labels=held_out).loss)
        tuned = PeftModel.from_pretrained(model, demo / "adapter")
        after = float(tuned(held_out, labels=held_out).loss)
    assert after < before - 0.05


def test_files_name_no_path(demo: Path) -> None:
    for file in (*demo.rglob("*.json"), *demo.rglob("*.jinja")):
        text = file.read_text(encoding="utf-8")
        assert str(demo.parent) not in text, file
        assert str(Path.home()) + "/" not in text, file
    assert not read_json(demo / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert {path.name for path in demo.iterdir()} == {"base", "adapter", "demo.json"}


def test_text_is_split_without_overlap(script: ModuleType) -> None:
    text = script.split_topics()
    parts = [text.base, text.base_held_out, text.adapter, text.adapter_held_out]
    paragraphs = [{paragraph for _, passage in part for paragraph in passage.split("\n\n")} for part in parts]
    assert sum(map(len, paragraphs)) == len(set().union(*paragraphs))
    assert {topic for topic, _ in text.base}.isdisjoint(topic for topic, _ in text.adapter)
    assert text == script.split_topics()


def test_a_made_demo_is_left_alone(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"settings": script.settings_hash()}))
    script.make_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert "nothing to do" in capsys.readouterr().err


def test_another_folder_is_not_replaced(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"no demo\.json"):
        script.make_demo(tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
