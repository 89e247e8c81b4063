"""What a GGUF header says of the model and its tokenizer, held against configuration and tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backends.gguf.header_reader import read_header
from exporter.backends.gguf.metadata.model_keys_check import header_faults
from exporter.families import find_family
from exporter.merge.model import MergedModel
from tests.folders import DELETED, copy, edit_json
from tests.merged import merged_model, metadata_of, plan_gguf, write_header


def stated(model: MergedModel, folder: Path) -> dict[str, Any]:
    """The metadata of a planned file, as it is read back."""
    return dict(read_header(write_header(plan_gguf(model), folder / "x.gguf")).metadata)


def faults(metadata: dict[str, Any], model: MergedModel) -> list[str]:
    family = find_family(model.config)
    assert family is not None
    return list(header_faults(metadata, model, family))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gguf_s_own_reader_reads_the_same_values(make_base: Callable[..., Path], tmp_path: Path, family: str) -> None:
    model = merged_model(make_base(family))
    ours = stated(model, tmp_path)
    theirs = metadata_of(tmp_path / "x.gguf")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert list(ours[key]) == value if isinstance(value, list) else ours[key] == value, key


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
BETAS = {"beta_fast": 16.0, "beta_slow": 2.0, "extrapolation_factor": 0.5}
SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.05, "do_sample": True}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | BETAS},
        {"rope_parameters": DELETED, "rope_theta": 500000},
        {"eos_token_id": [3, 4]},
    ],
)
def test_a_sound_header_has_no_fault(
    make_base: Callable[..., Path], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    base = copy(make_base(family), tmp_path / "base")
    edit_json(base / "config.json", **changes)
    model = merged_model(base)
    assert faults(stated(model, tmp_path), model) == []


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("generation_config.json", SAMPLING),
        ("generation_config.json", {"top_k": None, "temperature": 1}),
        ("config.json", {"bos_token_id": 380, "pad_token_id": 383, "sep_token_id": 9999}),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>", "unk_token": {"content": "<|endoftext|>"}}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "add_mask_token": True}),
        ("tokenizer_config.json", {"eos_token": None, "pad_token": "no such token", "add_bos_token": DELETED}),
    ],
)
def test_a_sound_header_of_other_tokens_has_no_fault(
    make_base: Callable[..., Path], tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    base = copy(make_base("qwen3"), tmp_path / "base")
    edit_json(base / file, **changes)
    model = merged_model(base)
    assert faults(stated(model, tmp_path), model) == []


def test_a_sound_header_of_tokens_of_every_type_has_no_fault(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Added ones that are no special tokens, of which one looks as if it were; a template that ends turns with one."""
    base = copy(make_base("qwen3"), tmp_path / "base")
    definition = json.loads((base / "tokenizer.json").read_text())
    count = max(entry["id"] for entry in definition["added_tokens"]) + 1
    plain = definition["added_tokens"][0] | {"special": False}
    for index, content in enumerate(["<tool>", "<|looks|>", "<|end|>"], count):
        definition["added_tokens"].append(plain | {"id": index, "content": content})
    (base / "tokenizer.json").write_text(json.dumps(definition))
    template = (base / "chat_template.jinja").read_text().replace("<|im_end|>", "<|end|>")
    (base / "chat_template.jinja").write_text(template)
    model = merged_model(base)
    metadata = stated(model, tmp_path)
    assert metadata["tokenizer.ggml.token_type"][count:] == [4, 3, 3] + [5] * 13
    assert metadata["tokenizer.ggml.eot_token_id"] == count + 2
    assert faults(metadata, model) == []
    for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eos_token_id"):
        assert len(faults(metadata | {key: 3}, model)) == 1


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", "qwen2", "general.architecture is 'qwen2' and should be 'qwen3'"),
        ("qwen3.rope.freq_base", 1e6, "qwen3.rope.freq_base is 1000000 and should be 10000"),
        (
            "qwen3.attention.layer_norm_rms_epsilon",
            1e-5,
            "qwen3.attention.layer_norm_rms_epsilon is 1e-05 and should be 1e-06",
        ),
        ("qwen3.context_length", 128, "qwen3.context_length is 128 and should be 256"),
        ("qwen3.attention.head_count_kv", None, "qwen3.attention.head_count_kv is missing and should be 2"),
        ("tokenizer.ggml.eos_token_id", 2, "tokenizer.ggml.eos_token_id is 2 and should be "),
        ("tokenizer.ggml.pre", "llama-bpe", "tokenizer.ggml.pre is 'llama-bpe' and should be 'qwen2'"),
        ("tokenizer.chat_template", "{{ messages }}", "tokenizer.chat_template is '{{ messages }}' and should be "),
        ("tokenizer.ggml.model", "llama", "tokenizer.ggml.model is 'llama' and should be 'gpt2'"),
        ("tokenizer.ggml.add_bos_token", True, "tokenizer.ggml.add_bos_token is True and should be False"),
        ("tokenizer.ggml.add_bos_token", None, "tokenizer.ggml.add_bos_token is missing and should be False"),
        ("tokenizer.ggml.add_eos_token", True, "tokenizer.ggml.add_eos_token is True and should be False"),
        ("tokenizer.ggml.padding_token_id", 2, "tokenizer.ggml.padding_token_id is 2 and should be "),
        ("general.sampling.temp", 1.0, "general.sampling.temp is 1 and should be 0.7"),
        ("general.sampling.top_k", 1, "general.sampling.top_k is 1 and should be 20"),
        ("general.sampling.top_p", None, "general.sampling.top_p is missing and should be 0.8"),
        ("general.sampling.penalty_repeat", 2.0, "general.sampling.penalty_repeat is 2 and should be 1.05"),
        ("general.type", "adapter", "general.type is 'adapter' and should be 'model'"),
    ],
)
def test_a_value_that_is_not_the_model_s_is_named(
    make_base: Callable[..., Path], tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    base = copy(make_base("qwen3"), tmp_path / "base")
    edit_json(base / "generation_config.json", **SAMPLING)
    model = merged_model(base)
    metadata = stated(model, tmp_path)
    assert key in metadata
    found = faults(metadata | {key: value}, model)
    assert len(found) == 1
    assert found[0].startswith(reason)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("qwen3.rope.scaling.type", "linear", "'linear'"),
        ("qwen3.rope.scaling.yarn_beta_fast", 2.0, "2"),
        ("qwen3.attention.sliding_window", 64, "64"),
        ("tokenizer.ggml.bos_token_id", 2, "2"),
        ("tokenizer.ggml.eot_token_id", 2, "2"),
        ("tokenizer.ggml.add_space_prefix", True, "True"),
        ("tokenizer.chat_templates", ["tool_use"], "['tool_use']"),
        ("general.sampling.mirostat", 2, "2"),
    ],
)
def test_a_value_that_the_model_does_not_have_is_named(
    make_base: Callable[..., Path], tmp_path: Path, key: str, value: Any, found: str
) -> None:
    model = merged_model(make_base("qwen3"))
    metadata = stated(model, tmp_path) | {key: value}
    assert faults(metadata, model) == [f"{key} is {found} and should be missing"]


def test_types_of_tokens_that_are_others_are_named(make_base: Callable[..., Path], tmp_path: Path) -> None:
    model = merged_model(make_base("qwen3"))
    metadata, key = stated(model, tmp_path), "tokenizer.ggml.token_type"
    types, size = metadata[key], model.config["vocab_size"]
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert faults(metadata | {key: [*types[:end], 1, *types[end + 1 :]]}, model) == [
        f"{key}[{end}] is 1 and should be 3"
    ]
    assert faults(metadata | {key: [*types[:-1], 1]}, model) == [f"{key}[{size - 1}] is 1 and should be 5"]
    assert faults(metadata | {key: [*types, 5]}, model) == [f"{key} has {size + 1} and should have {size}"]
    assert faults(metadata | {key: None}, model) == [f"{key}[0] is missing and should be 1"]
    tokens = [*metadata["tokenizer.ggml.tokens"], "more"]
    assert faults(metadata | {"tokenizer.ggml.tokens": tokens}, model) == [
        f"tokenizer.ggml.tokens has {size + 1} and should have {size}"
    ]


@pytest.mark.parametrize("key", ["tokens", "merges"])
def test_the_first_piece_that_is_another_is_named(make_base: Callable[..., Path], tmp_path: Path, key: str) -> None:
    model = merged_model(make_base("qwen3"))
    metadata = stated(model, tmp_path)
    pieces = list(metadata[f"tokenizer.ggml.{key}"])
    pieces[7], pieces[8] = pieces[8], pieces[7]
    found = faults(metadata | {f"tokenizer.ggml.{key}": pieces}, model)
    assert found == [f"tokenizer.ggml.{key}[7] is {pieces[7]!r} and should be {pieces[8]!r}"]
    short = faults(metadata | {f"tokenizer.ggml.{key}": pieces[:3]}, model)
    assert short[0].startswith(f"tokenizer.ggml.{key}[3] is missing")
    if key == "merges":
        more = [*metadata["tokenizer.ggml.merges"], "a b"]
        assert faults(metadata | {"tokenizer.ggml.merges": more}, model) == [
            f"tokenizer.ggml.merges has {len(more)} and should have {len(more) - 1}"
        ]
