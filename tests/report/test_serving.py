"""The commands that serve an artifact, as a shell and Python read them."""

from __future__ import annotations

import ast
import shlex

from exporter.report.serving import commands
from tests.report.manifests import case


def test_a_gguf_file() -> None:
    manifest = case("everything")
    (command,) = commands(manifest, manifest["artifacts"][0])
    assert command.text == "llama-server -m model-Q4_K_M.gguf"


def test_a_model_folder() -> None:
    manifest = case("gptq")
    vllm, transformers = commands(manifest, manifest["artifacts"][0])
    assert vllm.text == "vllm serve . --served-model-name model"
    ast.parse(transformers.text)
    assert "from_pretrained('.')" in transformers.text


def test_a_modelfile_is_for_ollama() -> None:
    manifest = case("everything")
    manifest["artifacts"][0]["files"].append("Modelfile")
    assert commands(manifest, manifest["artifacts"][0])[-1].text == "ollama create model -f Modelfile"


def test_names_are_quoted() -> None:
    manifest = case("gptq") | {"name": "my model; rm -rf ~"}
    artifact = case("everything")["artifacts"][0] | {"entry": "-a 'b'.gguf"}
    assert shlex.split(commands(manifest, artifact)[0].text) == ["llama-server", "-m", "./-a 'b'.gguf"]
    assert shlex.split(commands(manifest, manifest["artifacts"][0])[0].text)[-1] == "my model; rm -rf ~"


def test_a_format_without_a_runtime_has_no_command() -> None:
    manifest = case("everything")
    assert commands(manifest, manifest["artifacts"][0] | {"runtimes": []}) == []
