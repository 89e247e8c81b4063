"""The metadata of a GGUF header but for the tokenizer: by what the configuration says, and against the converter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import pytest

from exporter.backends.gguf.backend import plan_file
from exporter.backends.gguf.file_types import FILE_TYPES
from exporter.backends.gguf.imatrix.plan import MeasuredImatrix
from exporter.backends.gguf.metadata.model_keys import rope_metadata
from exporter.errors import RefusalError, UnsupportedModelError
from tests.folders import DELETED, copy, edit_json
from tests.merged import merged_model, metadata_of, planned_metadata, write_header
from tests.oracles import tools


@pytest.fixture
def folder(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    """A Qwen3 of its own, to change."""
    return copy(make_base("qwen3"), tmp_path / "base")


def planned(folder: Path, name: str = "model", quant: str = "F32") -> dict[str, Any]:
    return planned_metadata(merged_model(folder, name=name), folder.parent, quant)


def test_sizes_are_the_configuration_s(folder: Path) -> None:
    found = planned(folder)
    assert {key: value for key, value in found.items() if key.startswith("qwen3.")} == {
        "qwen3.block_count": 2,
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
    }
    assert found["general.architecture"] == "qwen3"
    assert found["general.type"] == "model"
    assert found["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_sizes_of_a_model_without_a_head_size_of_its_own(make_base: Callable[..., Path], tmp_path: Path) -> None:
    found = planned_metadata(merged_model(make_base("qwen2")), tmp_path)
    assert found["general.architecture"] == "qwen2"
    assert "qwen2.attention.key_length" not in found
    assert found["qwen2.attention.head_count_kv"] == 2


def test_as_many_key_value_heads_as_heads_where_the_configuration_names_none(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy(make_base("qwen2", kv_heads=4), tmp_path / "base")
    edit_json(folder / "config.json", num_key_value_heads=DELETED)
    assert planned(folder)["qwen2.attention.head_count_kv"] == 4


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_file_type(make_base: Callable[..., Path], tmp_path: Path, quant: str) -> None:
    plan = plan_file(merged_model(make_base("qwen3")), quant, MeasuredImatrix())
    found = metadata_of(write_header(plan, tmp_path / "header.gguf"))
    assert gguf.LlamaFileType(found["general.file_type"]).name.split("_", 1)[1] == quant


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": DELETED},
        {"num_hidden_layers": 0},
        {"num_attention_heads": "4"},
        {"max_position_embeddings": None},
        {"intermediate_size": 128.0},
        {"rms_norm_eps": DELETED},
    ],
    ids=str,
)
def test_a_size_that_is_not_one_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(RefusalError, match=f"config.json: {next(iter(change))}"):
        planned(folder)


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"freq_base": 10000.0}),
        ({"rope_theta": 1000000.0}, {"freq_base": 1e6}),
        ({"rope_theta": 1000000}, {"freq_base": 1e6}),
        ({"rope_scaling": None, "rope_theta": 5e5}, {"freq_base": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"freq_base": 1e6}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, {"freq_base": 1e6}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"scaling.type": "linear", "scaling.factor": 2.0, "freq_base": 1e6},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8, "rope_theta": 1e4}},
            {"scaling.type": "linear", "scaling.factor": 8.0, "freq_base": 1e4},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64, "freq_base": 1e6},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64, "freq_base": 1e6},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64, "freq_base": 1e6},
        ),
        (
            {"max_position_embeddings": 256, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 256, "freq_base": 1e4},
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 1e6, **YARN,
                    "beta_fast": 16, "beta_slow": 2.0, "extrapolation_factor": 0.5,
                }
            },
            {
                "scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64,
                "scaling.yarn_ext_factor": 0.5, "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0, "freq_base": 1e6,
            },
        ),
    ],
    ids=str,
)  # fmt: skip
def test_rope(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = rope_metadata(config)
    assert {key: value.value for key, value in found.items()} == expected
    types = {"scaling.type": "string", "scaling.original_context_length": "uint32"}
    assert {key: value.type for key, value in found.items()} == {key: types.get(key, "float32") for key in expected}


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "llama3", "mrope", "nonsense"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rope_scaling_that_gguf_has_no_words_for_is_refused(kind: str, key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=kind):
        rope_metadata({key: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": {"type": "yarn", "factor": None}},
        {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
        {"rope_scaling": "yarn"},
        {"rope_theta": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "large"}},
        # A rope for each kind of layer: taking the default of 10,000 instead would be wrong in silence.
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    ],
    ids=str,
)
def test_a_rope_that_cannot_be_read_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="rope"):
        rope_metadata({"max_position_embeddings": 256} | config)


def test_sliding_window_attention_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", use_sliding_window=True, sliding_window=64)
    with pytest.raises(UnsupportedModelError, match="use_sliding_window"):
        planned(folder)


@pytest.mark.parametrize(
    "change", [{"use_sliding_window": False, "sliding_window": 64}, {"use_sliding_window": True}], ids=str
)
def test_a_sliding_window_that_is_not_used_is_fine(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **change)
    assert planned(folder)["qwen3.block_count"] == 2


def _general(found: dict[str, Any]) -> dict[str, Any]:
    dull = {"general.architecture", "general.type", "general.file_type", "general.quantization_version"}
    return {key.removeprefix("general."): found[key] for key in found if key.startswith("general.") and key not in dull}


def test_name_and_its_parts(folder: Path) -> None:
    assert _general(planned(folder, "Qwen2.5-Coder-100K-Instruct-v1.2-my-lora")) == {
        "name": "Qwen2.5 Coder 100K Instruct v1.2 My Lora",
        "version": "v1.2",
        "finetune": "Instruct-my-lora",
        "basename": "Qwen2.5-Coder",
        "size_label": "100K",
    }


def test_size_label_of_a_name_that_has_none_counts_the_parameters(folder: Path) -> None:
    model = merged_model(folder)
    expected = gguf.size_label(model.parameters, model.parameters, 0, 0)
    assert planned(folder, "plain")["general.size_label"] == expected == "100K"


def test_size_label_of_a_name_that_lies_counts_the_parameters(folder: Path) -> None:
    assert planned(folder, "Qwen2.5-72B")["general.size_label"] == "100K"


def _write_card(folder: Path, front_matter: str) -> None:
    (folder / "README.md").write_text(f"---\n{front_matter}---\n\n# A model\n", encoding="utf-8")


def test_license_and_languages_of_the_base_s_card(folder: Path) -> None:
    _write_card(
        folder,
        "license: other\nlicense_name: qwen-research\nlicense_link: https://example.org/LICENSE\n"
        "language:\n- en\n- zh\ntags:\n- chat\nbase_model: Qwen/Another\nname: not this one\n",
    )
    assert _general(planned(folder)) == {
        "name": "Model",
        "size_label": "100K",
        "license": "other",
        "license.name": "qwen-research",
        "license.link": "https://example.org/LICENSE",
        "tags": ["chat"],
        "languages": ["en", "zh"],
    }


def test_a_list_of_licenses_is_joined(folder: Path) -> None:
    _write_card(folder, "license:\n- mit\n- apache-2.0\nlanguage: en\n")
    found = planned(folder)
    assert found["general.license"] == "mit,apache-2.0"
    assert found["general.languages"] == ["en"]


@pytest.mark.parametrize(
    "card",
    [b"# no front matter\n", b"---\nlicense: [\n---\n", b"---\n- a list\n---\n", b"---\nlicense: \xff\n---\n", b""],
    ids=repr,
)
def test_a_card_that_cannot_be_read_is_passed_over(folder: Path, card: bytes) -> None:
    (folder / "README.md").write_bytes(card)
    assert "general.license" not in planned(folder)


def test_sampling_of_the_generation_config(folder: Path) -> None:
    edit_json(
        folder / "generation_config.json",
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, min_p=0, repetition_penalty=1.05, eos_token_id=[1, 2],
    )  # fmt: skip
    found = planned(folder)
    prefix = "general.sampling."
    assert {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)} == {
        "temp": pytest.approx(0.7),
        "top_p": pytest.approx(0.8),
        "top_k": 20,
        "min_p": 0.0,
        "penalty_repeat": pytest.approx(1.05),
    }


def test_no_generation_config_no_sampling(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert not [key for key in planned(folder) if "sampling" in key]


def test_no_quantization_changes_the_metadata_but_for_the_file_type(folder: Path) -> None:
    one, other = planned(folder, quant="F32"), planned(folder, quant="Q4_K_M")
    assert one.pop("general.file_type") != other.pop("general.file_type")
    assert list(one) == list(other)
    assert one == other


@dataclass(frozen=True)
class Variation:
    """What is changed of a small base, and which keys then differ from the converter's."""

    family: str = "qwen2"
    name: str = "model"
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None
    different: tuple[str, ...] = ()


VARIATIONS = {
    "qwen2": Variation(),
    "qwen3": Variation("qwen3"),
    "named": Variation("qwen2", "Qwen2.5-Coder-100K-Instruct-v1.2"),
    "old-theta": Variation(config={"rope_parameters": DELETED, "rope_theta": 1e6}),
    "old-yarn": Variation(
        config={"rope_parameters": DELETED, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}}
    ),
    "new-yarn": Variation(
        "qwen3", config={"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "beta_fast": 16.0, **YARN}}
    ),
    "linear": Variation("qwen3", config={"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "ids": Variation(
        config={"bos_token_id": 381, "eos_token_id": 383}, tokenizer_config={"eos_token": "<|endoftext|>"}
    ),
    "sampling": Variation(
        "qwen3",
        generation_config={
            "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1,
        },
    ),
    "card": Variation(
        "qwen3",
        "Qwen3-100K",
        card="license: apache-2.0\nlicense_link: https://example.org/LICENSE\nlanguage:\n- en\n- zh\ntags:\n- chat\n"
        "pipeline_tag: text-generation\nlibrary_name: transformers\n",
        different=("general.tags",),
    ),
    "lineage": Variation(
        card="license: mit\nbase_model: Qwen/Qwen2.5-0.5B\ndatasets:\n- some/data\n",
        different=("general.base_model.*", "general.dataset.*"),
    ),
    "templates": Variation(
        tokenizer_config={
            "chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        },
        different=("tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.chat_template.tool_use"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("label", VARIATIONS)
def test_metadata_are_those_of_llama_cpp_s_converter(
    make_base: Callable[..., Path], tmp_path: Path, label: str
) -> None:
    variation = VARIATIONS[label]
    folder = copy(make_base(variation.family), tmp_path / variation.name)
    edit_json(folder / "config.json", **variation.config)
    edit_json(folder / "tokenizer_config.json", **variation.tokenizer_config)
    edit_json(folder / "generation_config.json", **variation.generation_config)
    _add_tokens(folder)
    if variation.card:
        _write_card(folder, variation.card)
    theirs = metadata_of(tools.convert(folder, tmp_path / "theirs.gguf", name=None))
    ours = planned(folder, variation.name)

    def alike(key: str) -> bool:
        return not any(fnmatchcase(key, pattern) for pattern in variation.different)

    assert {key: ours[key] for key in ours if alike(key)} == {key: theirs[key] for key in theirs if alike(key)}
    assert [key for key in ours if key in theirs] == [key for key in theirs if key in ours]
    # What is said to differ does, or the list of it would rot.
    for pattern in variation.different:
        assert {k: v for k, v in ours.items() if fnmatchcase(k, pattern)} != {
            k: v for k, v in theirs.items() if fnmatchcase(k, pattern)
        }
        assert any(pattern == known or fnmatchcase(pattern, known) for known in tools.DIFFERENT_METADATA), pattern


def _add_tokens(folder: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    definition["added_tokens"] += [
        {"id": index, "content": content, **flags} for index, content in ((384, "<tool_call>"), (385, "<|odd|>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
