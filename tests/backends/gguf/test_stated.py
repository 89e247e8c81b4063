"""What a GGUF header says of the model and its tokenizer, held against configuration and tokenizer files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backends.gguf.reading import read_header
from exporter.backends.gguf.stated import header_faults
from exporter.families import find_family
from exporter.model import MergedModel
from tests.folders import DELETED, copy, edit_json
from tests.merged import merged_model, plan_gguf, write_header


def stated(model: MergedModel, folder: Path) -> dict[str, Any]:
    """The metadata of a planned file, as it is read back."""
    return dict(read_header(write_header(plan_gguf(model), folder / "x.gguf")).metadata)


def faults(metadata: dict[str, Any], model: MergedModel) -> list[str]:
    family = find_family(model.config)
    assert family is not None
    return list(header_faults(metadata, model, family))


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_parameters": YARN}, {"rope_parameters": DELETED, "rope_theta": 500000}, {"eos_token_id": [3, 4]}],
)
def test_a_sound_header_has_no_fault(
    make_base: Callable[..., Path], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    base = copy(make_base(family), tmp_path / "base")
    edit_json(base / "config.json", **changes)
    model = merged_model(base)
    assert faults(stated(model, tmp_path), model) == []


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
    ],
)
def test_a_value_that_is_not_the_model_s_is_named(
    make_base: Callable[..., Path], tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    model = merged_model(make_base("qwen3"))
    metadata = stated(model, tmp_path)
    assert key in metadata
    found = faults(metadata | {key: value}, model)
    assert len(found) == 1
    assert found[0].startswith(reason)


def test_a_value_that_the_model_does_not_have_is_named(make_base: Callable[..., Path], tmp_path: Path) -> None:
    model = merged_model(make_base("qwen3"))
    metadata = stated(model, tmp_path) | {"qwen3.rope.scaling.type": "linear"}
    assert faults(metadata, model) == ["qwen3.rope.scaling.type is 'linear' and should be missing"]


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
