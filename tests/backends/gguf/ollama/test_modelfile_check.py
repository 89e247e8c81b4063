"""The Modelfile beside a GGUF file, held against the one that the model calls for.

Our check judges our Modelfiles here. Ollama itself is not run: test_modelfile.py reads them by the rules of its parser.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backends.gguf.ollama.modelfile_check import modelfile_faults
from exporter.backends.registry import load_backend
from exporter.merge.model import MergedModel
from tests.exports import export_to
from tests.folders import copy, edit_json
from tests.merged import merged_model

SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "eos_token_id": [381, 383]}


@pytest.fixture(scope="module")
def exported(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[MergedModel, Path]:
    """A model and a GGUF file of it with a Modelfile; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("modelfile")
    base = copy(make_base("qwen3"), folder / "base")
    edit_json(base / "generation_config.json", **SAMPLING)
    export_to(folder / "out", base, format="gguf", quant=("Q8_0",), name="model")
    return merged_model(base), folder / "out" / "model-Q8_0.gguf"


def faults(model: MergedModel, file: Path) -> list[str]:
    reader = load_backend("gguf").read(model, "Q8_0", file)
    assert reader is not None
    reader.close()
    return list(reader.faults)


def test_a_sound_file_has_no_fault(exported: tuple[MergedModel, Path]) -> None:
    assert (exported[1].parent / "Modelfile").is_file()
    assert faults(*exported) == []


def test_each_of_several_files_has_one_of_its_own(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2")
    export_to(tmp_path / "out", base, format="gguf", quant=("F16", "Q8_0"), name="model")
    model, file = merged_model(base), tmp_path / "out" / "model-Q8_0.gguf"
    assert faults(model, file) == []
    beside = tmp_path / "out" / "Modelfile.Q8_0"
    beside.write_text(beside.read_text().replace("Q8_0", "F16"))
    assert faults(model, file) == [
        "Modelfile.Q8_0: FROM is './model-F16.gguf' and should be './model-Q8_0.gguf'"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "generation"),
    [
        (None, {"do_sample": False}),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", {"temperature": 1.0}),
    ],
    ids=["greedy", "no-template"],
)
def test_a_sound_file_of_other_kinds_has_no_fault(
    make_base: Callable[..., Path], tmp_path: Path, template: str | None, generation: dict[str, Any]
) -> None:
    base = copy(make_base("qwen3"), tmp_path / "base")
    edit_json(base / "generation_config.json", **generation)
    if template:
        (base / "chat_template.jinja").write_text(template)
    export_to(tmp_path / "out", base, format="gguf", quant=("Q8_0",), name="model")
    assert faults(merged_model(base), tmp_path / "out" / "model-Q8_0.gguf") == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{{ .Content }}", "{{ .Role }}", "Modelfile: TEMPLATE is '{{- $system"),
        ("PARAMETER stop ", "PARAMETER seed ", "Modelfile: PARAMETER stop is missing and should be '\"<|"),
        ('<|im_end|>"\n', '<|eot_id|>"\n', "Modelfile: PARAMETER stop is "),
        ("temperature 0.6", "temperature 1.6", "Modelfile: PARAMETER temperature is '1.6' and should be '0.6'"),
        ("PARAMETER top_k 20\n", "", "Modelfile: PARAMETER top_k is missing and should be '20'"),
        ("FROM ./", "FROM ./other-", "Modelfile: FROM is './other-model-Q8_0.gguf' and should be './model-Q8_0.gguf'"),
        (
            "PARAMETER top_k",
            "system You are Llama.\nPARAMETER top_k",
            "Modelfile: SYSTEM is 'You are Llama.' and should",
        ),
        (
            "PARAMETER top_k",
            'SYSTEM """You\nare\n"""\nPARAMETER top_k',
            r"Modelfile: SYSTEM is 'You\nare\n' and should be missing",
        ),
    ],
)
def test_what_it_says_otherwise_is_named(
    exported: tuple[MergedModel, Path], tmp_path: Path, old: str, new: str, reason: str
) -> None:
    file = copy(exported[1].parent, tmp_path / "out") / exported[1].name
    beside = file.with_name("Modelfile")
    text = beside.read_text()
    assert old in text
    beside.write_text(text.replace(old, new))
    assert faults(exported[0], file)[0].startswith(reason)


def test_comments_and_blanks_are_no_fault_and_neither_is_none_at_all(
    exported: tuple[MergedModel, Path], tmp_path: Path
) -> None:
    """Another version of the exporter may explain the file in other words."""
    file = copy(exported[1].parent, tmp_path / "out") / exported[1].name
    beside = file.with_name("Modelfile")
    lines = [line for line in beside.read_text().splitlines() if not line.startswith("#")]
    beside.write_text("# Another comment.\n\n" + "\n".join(lines))
    assert list(modelfile_faults(file, "Q8_0", exported[0])) == []
    beside.unlink()
    assert list(modelfile_faults(file, "Q8_0", exported[0])) == []
