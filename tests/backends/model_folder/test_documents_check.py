"""The small files of a model folder, held against what they were made from.

Our check judges our folders here. tests/backends/safetensors/test_backend.py loads such a configuration with
transformers, and compares the other files with the base's, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backends.model_folder.documents_check import document_faults
from exporter.merge.model import MergedModel
from tests.exports import export_to
from tests.folders import DELETED, copy, edit_json
from tests.merged import merged_model


@pytest.fixture
def exported(make_base: Callable[..., Path], tmp_path: Path) -> tuple[MergedModel, Path]:
    """A model and a folder of it, to change."""
    base = make_base("qwen3")
    export_to(tmp_path / "out", base, quant=("fp16",))
    return merged_model(base), tmp_path / "out"


def test_a_sound_folder_has_no_fault(exported: tuple[MergedModel, Path]) -> None:
    assert document_faults(*exported) == ()


def test_a_folder_that_names_more_stops_than_the_base_has_no_fault(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Where the sources of stop tokens disagree, generation_config.json is not the base's."""
    base = copy(make_base("qwen3"), tmp_path / "base")
    edit_json(base / "config.json", eos_token_id=3)
    edit_json(base / "generation_config.json", eos_token_id=3)
    export_to(tmp_path / "out", base, quant=("bf16",))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] != 3
    assert document_faults(merged_model(base), tmp_path / "out") == ()


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "config.json: rms_norm_eps is 1e-05 and should be 1e-06"),
        ("config.json", {"rms_norm_eps": DELETED}, "config.json: rms_norm_eps is missing and should be 1e-06"),
        ("config.json", {"rope_scaling": {"factor": 2}}, 'config.json: rope_scaling is {"factor": 2} and should be m'),
        ("config.json", {"tie_word_embeddings": False}, "config.json: tie_word_embeddings is false and should be true"),
        ("generation_config.json", {"eos_token_id": 2}, "generation_config.json: eos_token_id is 2 and should be"),
        ("tokenizer_config.json", {"eos_token": "<s>"}, 'tokenizer_config.json: eos_token is "<s>" and should be'),
        ("special_tokens_map.json", {}, "special_tokens_map.json is not one of the model's files"),
    ],
)
def test_a_value_that_is_not_the_model_s_is_named(
    exported: tuple[MergedModel, Path], file: str, changes: dict[str, Any], reason: str
) -> None:
    model, folder = exported
    edit_json(folder / file, **changes)
    found = document_faults(model, folder)
    assert len(found) == 1
    assert found[0].startswith(reason)


def test_a_value_inside_of_another_is_named(exported: tuple[MergedModel, Path]) -> None:
    model, folder = exported
    values = json.loads((folder / "tokenizer.json").read_text())
    merges = values["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert document_faults(model, folder)[0].startswith(f"tokenizer.json: model.merges[{len(merges) - 2}]")


def test_the_same_values_in_other_bytes_are_no_fault(exported: tuple[MergedModel, Path]) -> None:
    model, folder = exported
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    assert document_faults(model, folder) == ()


def test_a_file_that_is_missing_or_not_readable_is_named(exported: tuple[MergedModel, Path]) -> None:
    model, folder = exported
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text("{")
    found = document_faults(model, folder)
    assert found[0].startswith("generation_config.json is not JSON")
    assert found[1:] == ("tokenizer.json is missing", "chat_template.jinja is not the source's")
