"""Recipes: validated whole, unknown keys refused, paths relative to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from exporter.cli import arguments
from exporter.errors import MissingFileError, RecipeError, RefusalError
from exporter.recipe import Calibration, Evaluation, Execution, Limits, Output, Recipe

OUTPUT = {"format": "gguf", "out": "served"}
MINIMAL: dict[str, Any] = {"base": "org/base", "outputs": [OUTPUT]}


def test_defaults_are_the_documented_ones() -> None:
    recipe = Recipe.build(MINIMAL)
    assert recipe.adapters == ()
    assert recipe.outputs == (Output(format="gguf", out=Path("served")),)
    assert recipe.outputs[0].quant == ()
    assert recipe.verify
    assert not recipe.force
    assert recipe.evaluation == Evaluation(tokens=4096, n_ctx=512, gate={})
    assert recipe.calibration == Calibration(text=None, tokens=16384, window=1024, seed=0)


def test_one_name_stands_for_a_list_of_one() -> None:
    recipe = Recipe.build(MINIMAL | {"adapters": "org/lora", "outputs": [OUTPUT | {"quant": "Q8_0"}]})
    assert recipe.adapters == ("org/lora",)
    assert recipe.outputs[0].quant == ("Q8_0",)


def test_recipe_is_frozen() -> None:
    recipe = Recipe.build(MINIMAL)
    with pytest.raises(ValidationError):
        recipe.base = "other"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"bases": "x"}, "bases"),
    "unknown key of an output": ({"outputs": [OUTPUT | {"quants": "Q8_0"}]}, "outputs.0.quants"),
    "unknown key of the evaluation": ({"evaluation": {"windows": 3}}, "evaluation.windows"),
    "no base": ({"base": None}, "base"),
    "base is a number": ({"base": 3}, "base"),
    "adapters are a mapping": ({"adapters": {"a": 1}}, "adapters"),
    "adapter is a number": ({"adapters": [3]}, "adapters.0"),
    "no outputs": ({"outputs": []}, "outputs"),
    "outputs are a mapping": ({"outputs": OUTPUT}, "outputs"),
    "output is text": ({"outputs": ["served"]}, "outputs.0"),
    "no format": ({"outputs": [{"out": "served"}]}, "outputs.0.format"),
    "no folder": ({"outputs": [{"format": "gguf"}]}, "outputs.0.out"),
    "folder is null": ({"outputs": [OUTPUT | {"out": None}]}, "outputs.0.out"),
    "folder is a number": ({"outputs": [OUTPUT | {"out": 5}]}, "outputs.0.out"),
    "a type twice": ({"outputs": [OUTPUT | {"quant": ["Q8_0", "Q4_0", "q8_0"]}]}, "outputs.0.quant"),
    "one folder twice": ({"outputs": [OUTPUT, OUTPUT | {"out": "x/../served"}]}, "recipe"),
    "options are a list": ({"outputs": [OUTPUT | {"options": ["a"]}]}, "outputs.0.options"),
    "name with a path": ({"name": "../x"}, "name"),
    "name with a slash": ({"name": "a/b"}, "name"),
    "name that is hidden": ({"name": ".x"}, "name"),
    "name that is empty": ({"name": ""}, "name"),
    "name with a line break": ({"name": "a\n"}, "name"),
    "too few tokens": ({"evaluation": {"tokens": 63}}, "evaluation.tokens"),
    "window too small": ({"evaluation": {"n_ctx": 15}}, "evaluation.n_ctx"),
    "window too large": ({"evaluation": {"n_ctx": 32769}}, "evaluation.n_ctx"),
    "window is text": ({"evaluation": {"n_ctx": "wide"}}, "evaluation.n_ctx"),
    "text of the evaluation": ({"evaluation": {"calibration": "text.txt"}}, "evaluation.calibration"),
    "calibration is a file": ({"calibration": "text.txt"}, "calibration"),
    "text is a number": ({"calibration": {"text": 3}}, "calibration.text"),
    "too few calibration tokens": ({"calibration": {"tokens": 63}}, "calibration.tokens"),
    "calibration window too small": ({"calibration": {"window": 15}}, "calibration.window"),
    "calibration window too large": ({"calibration": {"window": 32769}}, "calibration.window"),
    "seed is text": ({"calibration": {"seed": "x"}}, "calibration.seed"),
    "unknown key of the calibration": ({"calibration": {"n_ctx": 64}}, "calibration.n_ctx"),
    "gate is a number": ({"evaluation": {"gate": 0.1}}, "evaluation.gate"),
    "limit is text": ({"evaluation": {"gate": {"Q8_0": "small"}}}, "evaluation.gate.Q8_0"),
    "limit of a figure that has none": ({"evaluation": {"gate": {"Q8_0": {"loss": 0.1}}}}, "evaluation.gate"),
    "limit is negative": ({"evaluation": {"gate": {"Q8_0": -0.1}}}, "evaluation.gate"),
    "limit that nothing breaks": ({"evaluation": {"gate": {"*": float("nan")}}}, "evaluation.gate"),
    "limits of a type in two cases": ({"evaluation": {"gate": {"Q8_0": 0.1, "q8_0": 0.5}}}, "evaluation.gate"),
    "limit that is infinite": ({"evaluation": {"gate": {"*": float("inf")}}}, "evaluation.gate"),
    "verify is a word": ({"verify": "maybe"}, "verify"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("way", ["build", "load"])
def test_what_does_not_validate_is_refused(tmp_path: Path, kind: str, way: str) -> None:
    changes, where = WRONG[kind]
    values = MINIMAL | changes
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as caught:
        Recipe.build(values) if way == "build" else Recipe.load(file)
    assert caught.value.thing.startswith(where)


@pytest.mark.parametrize(
    "content", ["", "text", "- a\n- b", "base: [", "\t", "base: !!python/object:os.system {}", "1: 2"]
)
def test_file_that_is_no_recipe(tmp_path: Path, content: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError):
        Recipe.load(file)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00base")
    with pytest.raises(RecipeError):
        Recipe.load(file)


def test_key_that_is_given_twice(tmp_path: Path) -> None:
    # YAML forbids it, but its usual reader takes the last one and says nothing.
    file = tmp_path / "recipe.yaml"
    file.write_text("base: one\noutputs: [{format: gguf, out: a}]\nbase: two\n")
    with pytest.raises(RecipeError, match="base"):
        Recipe.load(file)


def test_file_that_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(MissingFileError):
            Recipe.load(path)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    for name in ("base", "lora"):
        (folder / name).mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "base: base\nadapters: [lora, org/hub-lora@v1]\n"
        "outputs: [{format: gguf, out: ../served, options: {imatrix: im.gguf}},"
        " {format: gguf, out: other, options: {imatrix: auto}},"
        f" {{format: safetensors, out: {tmp_path}/absolute}}]\n"
        "calibration: {text: text.txt}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(Path("recipes/recipe.yaml"))
    assert Path(recipe.base).resolve() == folder / "base"
    assert Path(recipe.adapters[0]).resolve() == folder / "lora"
    assert recipe.adapters[1] == "org/hub-lora@v1"
    outs = [output.out.resolve() for output in recipe.outputs]
    assert outs == [tmp_path / "served", folder / "other", tmp_path / "absolute"]
    matrices = [output.options.get("imatrix") for output in recipe.outputs]
    assert [Path(str(matrices[0])).resolve(), *matrices[1:]] == [folder / "im.gguf", "auto", None]
    assert recipe.calibration.file is not None
    assert recipe.calibration.file.resolve() == folder / "text.txt"


@pytest.mark.parametrize(
    ("text", "there", "kind"),
    [
        ("text.txt", False, "anchored"), ("sub/text.jsonl", False, "anchored"), ("org/name", True, "anchored"),
        ("org/name", False, "dataset"), ("org/na-me.v1@refs/pr/1:test#body", False, "dataset"),
        ("plain", False, "file"), ("plain", True, "anchored"), ("a/b/c", False, "file"), ("./a", False, "file"),
        ("org/name:en/train#text", False, "dataset"), ("org/name@v1:20231101.en/train[1]", False, "file"),
        ("org/name:en/", False, "file"), ("org/name:a/b/c", False, "file"),
        ("org/name.json", False, "anchored"), ("org/name:", False, "file"), ("a" * 300 + "/b", False, "dataset"),
    ],
)  # fmt: skip
def test_a_text_is_a_file_or_a_dataset(tmp_path: Path, text: str, there: bool, kind: str) -> None:
    folder = tmp_path / "recipes"
    (folder / "org").mkdir(parents=True)
    if there:
        (folder / text).write_text("text")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(MINIMAL | {"calibration": {"text": text}}))
    found = Recipe.load(folder / "recipe.yaml").calibration
    assert found.text == (str(folder / text) if kind == "anchored" else text)
    assert found.dataset == (text if kind == "dataset" else None)
    assert found.file == (None if kind == "dataset" else folder / text if kind == "anchored" else Path(text))
    assert found.name == (text if kind == "dataset" else Path(text).name)


def test_a_path_is_never_a_dataset() -> None:
    assert Calibration(text=Path("org/name")).dataset is None


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["base", "adapters", "outputs", "name", "verify", "calibration", "evaluation", "force", "other"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(KEYS, VALUES, max_size=3), output=st.dictionaries(st.sampled_from(["out", "quant"]), VALUES)
)
def test_anything_else_is_a_recipe_or_refused(tmp_path: Path, changes: dict[str, Any], output: dict[str, Any]) -> None:
    values = {"base": "org/base", "outputs": [OUTPUT | output]} | changes
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    try:
        recipe = Recipe.load(file)
    except RefusalError:
        return
    assert recipe.outputs


@pytest.mark.parametrize(
    "values", [{"device": "tpu"}, {"device": "cuda:"}, {"device": "cpu:0"}, {"threads": 0}, {"block_bytes": 100}]
)
def test_execution_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Execution(**values)


def test_limits_by_name_and_by_number() -> None:
    gates = arguments._gates(["0.1", "Q8_0:kl=0.01", "Q8_0:same_top=0.9", "bf16:change=0.02", "bf16:top_k_kl=0"])
    assert gates == {"*": 0.1, "Q8_0": {"kl": 0.01, "same_top": 0.9}, "bf16": {"change": 0.02, "top_k_kl": 0.0}}
    found = Evaluation(gate=gates).gate
    assert found["*"] == 0.1
    assert found["Q8_0"] == Limits(kl=0.01, same_top=0.9)
