"""Runtimes are found by entry point: the built-in ones by the same door as one from another distribution."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from exporter import Execution, make_plan
from exporter.backends import registry as backends
from exporter.backends.registry import backend_names, load_backend
from exporter.errors import RecipeError
from exporter.plan.estimate import seconds
from exporter.publish.serving_commands import serving_commands
from exporter.runtimes import registry
from exporter.runtimes.artifact_facts import ArtifactFacts, PackedWeights
from exporter.runtimes.base import Runtime
from exporter.runtimes.registry import check_endpoint, choose_runtime, find_runtime, runtimes_for, startup_seconds
from exporter.tokens.windows import TokenSets
from exporter.verify.published.manifest_record import PublishedArtifact
from tests.backends.test_registry import NPY, install
from tests.commands import invoke, run
from tests.exports import recipe
from tests.merged import merged_model

Make = Callable[..., Path]
ADDRESS = "http://localhost:9"
BUILT_IN = ("llamacpp", "transformers", "vllm")

# The whole of a fourth runtime.
ECHO = """
from exporter.runtimes.base import Runtime

class Echo(Runtime):
    name = "echo"

    @classmethod
    def serves(cls, artifact):
        return artifact.entry == "."

    @classmethod
    def commands(cls, manifest, artifact):
        return [("echo", f"echo-serve --name {manifest['name']} {artifact['quant']}")]

    def score(self, artifact, windows, on_window, on_logits=None):
        from exporter.runtimes.transformers.runtime import Transformers
        return Transformers().score(artifact, windows, on_window, on_logits)

    def version(self):
        return "echo 1.0"
"""
VALUE = "echo_runtime:Echo"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution in this process; gone after the test."""

    def clear() -> None:
        registry._entries.cache_clear()
        backends._entries.cache_clear()

    def add(name: str, source: str, value: str, distribution: str = "one", kind: str = "runtime") -> None:
        monkeypatch.syspath_prepend(install(tmp_path / distribution, name, source, value, distribution, kind))
        monkeypatch.delitem(sys.modules, f"{name}_{kind}", raising=False)
        clear()

    yield add
    monkeypatch.undo()
    clear()


@pytest.fixture
def base(make_base: Make) -> Path:
    return make_base("qwen2")


def test_built_in_runtimes_enter_by_the_same_door() -> None:
    declared = {entry.name for entry in entry_points(group="exporter.runtimes")}
    assert declared >= set(BUILT_IN)
    assert set(registry.runtime_names()) == declared
    for name in BUILT_IN:
        assert issubclass(find_runtime(name), Runtime)
        assert find_runtime(name).name == name


@pytest.mark.parametrize("wanted", [True, False])
def test_a_runtime_from_outside_scores_and_stands_in_the_card(
    base: Path, make_adapter: Make, tmp_path: Path, wanted: bool
) -> None:
    """It comes after those that the backend names, so it scores where it is asked for, and serves in any case."""
    out = tmp_path / "out"
    env = {"PYTHONPATH": str(install(tmp_path / "site", "echo", ECHO, VALUE, kind="runtime"))}
    text = tmp_path / "text.txt"
    text.write_text("Text to score. " * 500)
    arguments: list[str | Path] = [
        "--base",
        base,
        "--adapter",
        make_adapter(base),
        "--format",
        "safetensors",
        "--name",
        "tuned",
    ]
    arguments += ["--calibration", text, "--eval-tokens", "128", "--max-eval-tokens", "128", "--eval-window", "64"]
    arguments += ["--out", out]
    arguments += ["--runtime", "echo"] if wanted else ["--no-verify"]
    result = run("export", *arguments, "--json", env=env)
    assert result.returncode == 0, result.stderr
    (artifact,) = json.loads((out / "export.json").read_text())["artifacts"]
    assert artifact["runtimes"] == ["vllm", "transformers", "echo"]
    assert f"echo-serve --name tuned {artifact['quant']}" in (out / "README.md").read_text()
    if wanted:
        assert artifact["verification"]["runtime"] == "echo 1.0"
        # It does nothing but score.
        assert "answers" not in artifact["verification"]


def test_a_backend_and_a_runtime_from_outside_find_each_other(
    installed: Callable[..., None], base: Path, tmp_path: Path
) -> None:
    installed("npy", NPY, "npy_backend:Npy", kind="backend")
    assert "npy" in backend_names()
    values: dict[str, Any] = {
        "format": "npy",
        "verify": True,
        "evaluation": {"tokens": 128, "max_tokens": 128, "n_ctx": 64},
    }
    with pytest.raises(RecipeError, match="no runtime that can score it"):
        make_plan(recipe(base, [], tmp_path / "out", **values), Execution())
    installed("echo", ECHO, VALUE, distribution="two")
    plan = make_plan(recipe(base, [], tmp_path / "out", **values), Execution())
    assert plan.artifacts[0].runtimes == ("echo",)
    assert list(plan.folders[0].runtimes.values()) == ["echo"]


def facts(entry: str, *files: str, packed: frozenset[PackedWeights] = frozenset()) -> ArtifactFacts:
    return ArtifactFacts("made", "made", entry, frozenset(files), packed)


@pytest.mark.parametrize(
    ("artifact", "serving"),
    [
        (facts("model.gguf", "model.gguf"), ("llamacpp",)),
        (facts(".", "config.json", "model.safetensors"), ("transformers", "vllm")),
        (facts(".", "config.json", "w.npy"), ()),
        (facts(".", "w.safetensors"), ()),
        # Whether it is one that they load depends on more than these facts: its backend says so.
        (facts(".", "config.json", "w.safetensors", packed=frozenset({PackedWeights("gptq", 4)})), ()),
    ],
)
def test_a_backend_may_leave_it_to_the_runtimes(artifact: ArtifactFacts, serving: tuple[str, ...]) -> None:
    assert runtimes_for(artifact, ()) == serving
    assert runtimes_for(artifact, ("transformers",)) == (
        "transformers",
        *(one for one in serving if one != "transformers"),
    )


@pytest.mark.parametrize("format_", ["gguf", "safetensors", "gptq"])
def test_of_our_formats_the_backends_name_all_runtimes(base: Path, format_: str) -> None:
    model, backend = merged_model(base), load_backend(format_)
    plan = backend.plan(model, backend.default_quant(model), {})
    assert plan.runtimes
    assert runtimes_for(plan.facts, plan.runtimes) == plan.runtimes


BROKEN = {
    "module that is missing": ("", "no_such_module:Echo"),
    "package that is missing": ("import no_such_package\n", VALUE),
    "class that is missing": ("", VALUE),
    "class that is no runtime": ("class Echo: pass\n", VALUE),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_that_does_not_load_takes_nothing_else_down(
    installed: Callable[..., None], base: Path, tmp_path: Path, kind: str
) -> None:
    installed("echo", *BROKEN[kind])
    with pytest.raises(RecipeError, match="echo"):
        find_runtime("echo")
    assert choose_runtime(("echo", "transformers"), endpoint=None) == "transformers"
    arguments: list[str | Path] = ["plan", "--base", base, "--format", "safetensors", "--out", tmp_path / "out"]
    arguments += ["--eval-tokens", "128", "--max-eval-tokens", "128", "--eval-window", "64"]
    assert invoke(*arguments).exit_code == 0
    failed = invoke(*arguments, "--runtime", "echo")
    assert failed.exit_code == 2
    assert "runtime 'echo' (" in failed.stderr.replace("\n", "")


def test_two_runtimes_of_one_name(installed: Callable[..., None]) -> None:
    installed("echo", ECHO, VALUE)
    installed("echo", ECHO, "echo_runtime:Other", distribution="other")
    with pytest.raises(RecipeError, match="one runtime of that name"):
        find_runtime("echo")


def test_a_folder_may_name_a_runtime_that_is_not_here(tmp_path: Path) -> None:
    artifact = PublishedArtifact(format="safetensors", quant="x", entry=".", runtimes=["echo", "transformers"], bytes=1)
    assert artifact.runtime(tmp_path) == "transformers"
    with pytest.raises(RecipeError, match="'echo'"):
        artifact.runtime(tmp_path, wanted="echo")
    with pytest.raises(RecipeError, match="'echo'"):
        artifact.model_copy(update={"runtimes": ["echo"]}).runtime(tmp_path)
    shown = serving_commands({"name": "model"}, artifact.model_dump() | {"files": []})
    assert [name for name, _ in shown] == ["transformers"]


def test_remedies_name_a_runtime_that_is_here(installed: Callable[..., None]) -> None:
    def remedy() -> str:
        with pytest.raises(RecipeError) as caught:
            choose_runtime(("vllm", "echo"), endpoint=None, wanted="vllm")
        return caught.value.remedy

    assert "--runtime" not in remedy()
    installed("echo", ECHO, VALUE)
    assert remedy().endswith("Or score with --runtime echo.")


SERVER = """
from exporter.runtimes.base import Runtime

class Echo(Runtime):
    name, title, takes_endpoint, startup_seconds = "echo", "Echo", True, 7.0

    def __init__(self, endpoint=None):
        self.endpoint = endpoint

    @classmethod
    def open(cls, device, endpoint):
        return cls(endpoint)

    def score(self, artifact, windows, on_window, on_logits=None):
        raise NotImplementedError

    def version(self):
        return f"echo at {self.endpoint}"
"""


def test_a_server_from_outside(installed: Callable[..., None]) -> None:
    installed("echo", SERVER, VALUE)
    check_endpoint(ADDRESS, ["llamacpp", "echo"])
    with pytest.raises(RecipeError, match="no artifact that Echo or vLLM scores, only llamacpp"):
        check_endpoint(ADDRESS, ["llamacpp"])
    assert registry.load_runtime("echo", endpoint=ADDRESS).version() == f"echo at {ADDRESS}"


def test_servers_that_are_started_count_in_the_estimate(installed: Callable[..., None], base: Path) -> None:
    installed("echo", SERVER, VALUE)
    names = ["echo", "vllm", "llamacpp", "vllm"]
    assert startup_seconds(names, None) == 7 + 2 * find_runtime("vllm").startup_seconds
    assert startup_seconds(names, ADDRESS) == 0
    model = merged_model(base)
    rest = seconds(model, (), 1, TokenSets(None, None))
    assert seconds(model, (), 1, TokenSets(None, None), startup=7.0) == pytest.approx(rest + 7)
