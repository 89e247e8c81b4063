"""Backends are found by entry point: the built-in ones by the same door as one from another distribution."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.backends import registry
from exporter.errors import ArtifactError, BackendError, ReferencePackError, UnknownFormatError
from exporter.plan.gate_limits import FALLBACK_GATE, LARGE, Gate, gate_for
from exporter.verify.published.without_manifest import bare_manifest
from tests.commands import invoke, run
from tests.exports import merge_with_us, refused
from tests.folders import listing

Make = Callable[..., Path]

# The whole of a third format: one .npy a tensor.
NPY = """
import io
import numpy as np
from exporter.backends.base import Backend
from exporter.backends.output_plan import FilePlan, OutputPlan, TensorPlan
from exporter.backends.pieces import whole
from exporter.backends.writing.offset_writer import OffsetWriter

class Npy(Backend):
    name, summary, quants, needs, packages = "npy", "one .npy file a tensor", ("f32",), "nothing", ("numpy",)

    def default_quant(self, model):
        return "f32"

    def plan(self, model, quant, options, *, verified):
        files, tensors = [], []
        for tensor in model.tensors:
            head = io.BytesIO()
            description = {"descr": "<f4", "fortran_order": False, "shape": tensor.shape}
            np.lib.format.write_array_header_1_0(head, description)
            start, file = head.tell(), f"{tensor.name}.npy"
            row_bytes = 4 * tensor.source.columns
            tensors.append(TensorPlan(tensor.name, whole(tensor.name), tensor.shape, "f32", file, start, row_bytes))
            files.append(FilePlan(file, start + tensors[-1].nbytes, head.getvalue()))
        return OutputPlan("npy", quant, ".", tuple(files), tuple(tensors))

    def open(self, plan, folder, *, resume):
        return OffsetWriter(plan, folder, lambda tensor, block: block.numpy().tobytes(), resume=resume)
"""


def install(folder: Path, name: str, source: str, value: str, distribution: str = "one", kind: str = "backend") -> Path:
    """Lay out a distribution as pip leaves it: a module, and metadata with an entry point."""
    module, metadata = folder / f"{name}_{kind}.py", folder / f"{distribution}-1.0.dist-info"
    metadata.mkdir(parents=True)
    module.write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[exporter.{kind}s]\n{name} = {value}\n")
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution in this process; gone after the test."""

    def add(name: str, source: str, value: str, distribution: str = "one") -> None:
        monkeypatch.syspath_prepend(install(tmp_path / distribution, name, source, value, distribution))
        monkeypatch.delitem(sys.modules, f"{name}_backend", raising=False)
        registry._entries.cache_clear()

    yield add
    monkeypatch.undo()
    registry._entries.cache_clear()


def test_built_in_backends_enter_by_the_same_door() -> None:
    declared = {entry.name for entry in entry_points(group="exporter.backends")}
    assert declared >= {"safetensors", "gguf"}
    assert set(registry.backend_names()) == declared
    for name in ("safetensors", "gguf"):
        assert registry.load_backend(name).name == name


def test_unknown_format_lists_what_exists(make_base: Make, tmp_path: Path) -> None:
    caught = refused(UnknownFormatError, tmp_path / "out", make_base(), format="onnx")
    assert "'onnx'" in caught.thing
    assert all(name in caught.expected for name in ("gguf", "safetensors"))


def test_backend_from_outside_exports(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base()
    adapter, out = make_adapter(base), tmp_path / "out"
    env = {"PYTHONPATH": str(install(tmp_path / "site", "npy", NPY, "npy_backend:Npy"))}
    inputs = ("--base", base, "--adapter", adapter)
    result = run("export", *inputs, "--format", "npy", "--out", out, "--no-verify", "--json", env=env)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    assert manifest["artifacts"][0]["format"] == "npy"
    expected = merge_with_us(tmp_path / "reference", base, adapter)
    assert listing(out) == {f"{name}.npy" for name in expected} | {"export.json", "README.md", "report.html"}
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(np.load(out / f"{name}.npy")), tensor)


def test_backend_from_outside_is_listed(installed: Callable[..., None]) -> None:
    installed("npy", NPY, "npy_backend:Npy")
    listed = json.loads(invoke("formats", "--json").stdout)
    names = [entry["name"] for entry in listed]
    assert names == sorted(names)
    assert {"gguf", "npy", "safetensors"} <= set(names)
    assert "one .npy file a tensor" in invoke("formats").stdout


def test_backend_that_nothing_can_verify_is_refused_by_the_plan(
    installed: Callable[..., None], make_base: Make, tmp_path: Path
) -> None:
    installed("npy", NPY, "npy_backend:Npy")
    arguments = ("--base", make_base(), "--format", "npy", "--out", tmp_path / "out")
    before = listing(tmp_path)
    for command in ("plan", "export"):
        result = invoke(command, *arguments)
        assert result.exit_code == 2, command
        assert "--no-verify" in result.stderr
    assert listing(tmp_path) == before


SAYING = (
    NPY
    + """
    def recognize(self, path):
        return Recognized("f32", path.name, ("theirs",), 12, 256, 99) if path.suffix == ".npy" else None

    def tags(self, quant):
        return ("numpy", f"of-{quant}")

Npy.limits = {"f32": TypeLimits(0.01, 0.9, 0.02, published=(0.005, 0.01), top_k=False)}
"""
).replace(
    "import io\n",
    "import io\n"
    + """
from exporter.backends.recognized import Recognized
from exporter.backends.type_limits import TypeLimits
""",
)


def test_backend_from_outside_says_its_limits_and_tags(installed: Callable[..., None]) -> None:
    installed("npy", SAYING, "npy_backend:Npy")
    assert gate_for("npy f32", "f32", {}, 1000) == Gate(0.01, 0.9, 0.02)
    assert gate_for("npy f32", "f32", {}, LARGE) == Gate(0.005, 0.9, 0.01, size_class="from_1b")
    assert gate_for("npy f16", "f16", {}, 1000) == FALLBACK_GATE
    backend = registry.find_backend("npy")
    assert backend is not None
    assert backend.tags("f32") == ("numpy", "of-f32")
    assert backend.packed_weights(Path()) == frozenset()
    assert registry.find_backend("onnx") is None


def test_backend_from_outside_recognizes_its_files(installed: Callable[..., None], tmp_path: Path) -> None:
    """What another backend says of the file does not matter then, and no backend of a broken package either."""
    file, other = tmp_path / "model.npy", tmp_path / "model.txt"
    file.touch()
    other.touch()
    with pytest.raises(ArtifactError, match="GGUF"):
        bare_manifest(file, 256)
    installed("npy", SAYING, "npy_backend:Npy")
    installed("broken", "", "no_such_module:Backend", distribution="two")
    (artifact,) = bare_manifest(file, 256).artifacts
    assert (artifact.label, artifact.entry, artifact.runtimes, artifact.bytes) == ("npy f32", file.name, ["theirs"], 99)
    with pytest.raises(ArtifactError, match="GGUF"):
        bare_manifest(other, 256)
    with pytest.raises(ReferencePackError):
        bare_manifest(file, 300)


BROKEN = {
    "module that is missing": ("", "no_such_module:Backend"),
    "package that is missing": ("import no_such_package\n", "broken_backend:Backend"),
    "class that is missing": ("", "broken_backend:Backend"),
    "class that does not start": ("class Backend:\n    def __init__(self): 1 / 0\n", "broken_backend:Backend"),
    "class of another kind": ("class Backend: pass\n", "broken_backend:Backend"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_backend_that_does_not_load(installed: Callable[..., None], make_base: Make, tmp_path: Path, kind: str) -> None:
    source, value = BROKEN[kind]
    installed("broken", source, value)
    with pytest.raises(BackendError, match="broken"):
        registry.load_backend("broken")
    # One broken package takes nothing else down.
    listed = invoke("formats")
    assert listed.exit_code == 0
    assert "safetensors" in listed.stdout
    arguments = ("--base", make_base(), "--out", tmp_path / "out", "--no-verify")
    assert invoke("plan", *arguments, "--format", "safetensors").exit_code == 0
    failed = invoke("plan", *arguments, "--format", "broken")
    assert failed.exit_code in (1, 2)
    assert "broken" in failed.stderr


def test_two_backends_of_one_name(installed: Callable[..., None]) -> None:
    installed("npy", NPY, "npy_backend:Npy")
    installed("npy", NPY, "npy_backend:Other", distribution="other")
    with pytest.raises(BackendError, match="npy"):
        registry.load_backend("npy")
