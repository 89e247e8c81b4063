"""Adapter methods are found by entry point: LoRA by the same door as one from another distribution."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from exporter.adapters import registry
from exporter.adapters.adapter import Adapter
from exporter.adapters.base import RowInputs, Update
from exporter.errors import AdapterError, AdapterShapeError, UnsupportedAdapterError
from exporter.inputs.checkpoint import StoredTensor
from exporter.inputs.row_blocks import RowBlock
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.cpu import CpuMerger
from exporter.merge.model import MergedTensor
from tests.backends.test_registry import install
from tests.commands import run
from tests.exports import export_to, refused
from tests.folders import copy, edit_json, edit_tensors
from tests.ia3 import make_ia3
from tests.merged import merged_model

Make = Callable[..., Path]
Install = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]

# The whole of a second method: (IA)^3 of peft, which scales outputs of a layer, or inputs of a feedforward layer
# (Liu et al. 2022, https://arxiv.org/abs/2205.05638).
IA3 = """
from dataclasses import dataclass
from exporter.adapters.base import AdapterMethod, Update
from exporter.inputs.checkpoint import StoredTensor
from exporter.inputs.row_blocks import read_tensor

@dataclass(frozen=True)
class Scaled(Update):
    module: str
    factors: StoredTensor
    tensors = property(lambda self: (self.factors,))
    shape = property(lambda self: tuple(None if size == 1 else size for size in self.factors.shape))

    def read_whole(self, reader, source):
        return (read_tensor(reader, self.factors),)

    def apply(self, rows, inputs):
        factors = inputs.whole[0]
        rows *= factors if len(factors) == 1 else factors[inputs.first_row : inputs.first_row + len(rows)]

class Ia3(AdapterMethod):
    name, title, peft_type = "ia3", "(IA)3", "IA3"
    settings = frozenset({"feedforward_modules", "init_ia3_weights"})

    def read(self, header, config):
        modules = {name.removeprefix("base_model.model.").removesuffix(".ia3_l"): name for name in header}
        return {module: Scaled(module, header[name]) for module, name in modules.items()}, {}
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution in this process; gone after the test."""

    def add(name: str, source: str, value: str, distribution: str = "one") -> None:
        monkeypatch.syspath_prepend(install(tmp_path / distribution, name, source, value, distribution, kind="adapter"))
        monkeypatch.delitem(sys.modules, f"{name}_adapter", raising=False)
        registry._entries.cache_clear()

    yield add
    monkeypatch.undo()
    registry._entries.cache_clear()


@pytest.fixture(scope="module")
def base(make_base: Make) -> Path:
    return make_base("qwen3", layers=1, intermediate=192)


@pytest.fixture(scope="module")
def scaled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter that peft made, and the tensors of its own merge in float32."""
    folder = tmp_path_factory.mktemp("ia3") / "adapter"
    return folder, make_ia3(base, folder)


def assert_equal(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """The folder's tensors are these, bit for bit."""
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_lora_enters_by_the_same_door() -> None:
    declared = {entry.name for entry in entry_points(group="exporter.adapters")}
    assert "lora" in declared
    assert set(registry.method_names()) == declared
    assert registry.load_method("lora").name == "lora"


def test_method_from_outside_exports(base: Path, scaled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    (adapter, expected), out = scaled, tmp_path / "out"
    env = {"PYTHONPATH": str(install(tmp_path / "site", "ia3", IA3, "ia3_adapter:Ia3", kind="adapter"))}
    inputs = ("--base", base, "--adapter", adapter)
    result = run(
        "export", *inputs, "--format", "safetensors", "--quant", "fp32", "--out", out, "--no-verify", "--json", env=env
    )
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    jsonschema.validate(manifest, json.loads((ROOT / "docs" / "export.schema.json").read_text(encoding="utf-8")))
    assert manifest["inputs"][1]["adapter"] == {
        "method": "ia3", "targets": 3, "modules": ["down_proj", "k_proj", "up_proj"],
    }  # fmt: skip
    assert "ia3 on 3 tensors" in (out / "README.md").read_text()
    assert "adapter: ia3, on <data" in (out / "report.html").read_text()
    assert_equal(out, expected)


def test_method_from_outside_is_given_the_number_of_the_first_row(
    installed: Install, base: Path, scaled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    installed("ia3", IA3, "ia3_adapter:Ia3")
    adapter, expected = scaled
    export_to(tmp_path / "out", base, adapter, quant="fp32", block_bytes=4096, threads=3)
    assert_equal(tmp_path / "out", expected)


@pytest.mark.slow
def test_method_from_outside_is_verified_against_the_layers_of_peft(
    base: Path, scaled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from pydoc_data.topics import topics

    (tmp_path / "text.txt").write_text(topics["assignment"] + topics["class"])
    env = {"PYTHONPATH": str(install(tmp_path / "site", "ia3", IA3, "ia3_adapter:Ia3", kind="adapter"))}
    inputs = ("--base", base, "--adapter", scaled[0], "--calibration", tmp_path / "text.txt")
    tokens = ("--eval-tokens", "512", "--eval-window", "128")
    output = ("--format", "gguf", "--quant", "F16", "--out", tmp_path / "out", "--json")
    result = run("export", *inputs, *tokens, *output, env=env)
    assert result.returncode == 0, result.stderr
    artifact = json.loads(result.stdout)["artifacts"][0]
    assert artifact["verification"]["verdict"] == "passed"
    assert artifact["weights"]["survival"] == pytest.approx(1, abs=0.01)


def test_adapter_that_no_method_recognizes(
    base: Path, scaled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    caught = refused(UnsupportedAdapterError, tmp_path / "out", base, scaled[0])
    assert "peft_type" in caught.thing
    assert "IA3" in caught.found
    assert "'LORA'" in caught.expected


def test_update_of_a_size_that_it_leaves_open(
    installed: Install, base: Path, scaled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    installed("ia3", IA3, "ia3_adapter:Ia3")
    adapter = copy(scaled[0], tmp_path / "adapter")
    name = "base_model.model.model.layers.0.mlp.up_proj.ia3_l"
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.update({name: torch.ones(7, 1)}))
    with pytest.raises(AdapterShapeError) as caught:
        merged_model(base, adapter)
    assert caught.value.thing == name
    assert "[7, any]" in caught.value.found


BROKEN = {
    "module that is missing": ("", "no_such_module:Method"),
    "package that is missing": ("import no_such_package\n", "broken_adapter:Method"),
    "class that is missing": ("", "broken_adapter:Method"),
    "class that does not start": ("class Method:\n    def __init__(self): 1 / 0\n", "broken_adapter:Method"),
    "class that is no method": ("class Method: pass\n", "broken_adapter:Method"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_method_that_does_not_load(
    installed: Install, base: Path, make_adapter: Make, scaled: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    source, value = BROKEN[kind]
    installed("broken", source, value)
    with pytest.raises(AdapterError, match="broken"):
        registry.load_method("broken")
    # It stands in the way of those adapters alone that may be its own.
    assert Adapter.open(make_adapter(base)).method.name == "lora"
    with pytest.raises(AdapterError, match="broken"):
        Adapter.open(scaled[0])


def test_two_methods_of_one_name(installed: Install) -> None:
    installed("ia3", IA3, "ia3_adapter:Ia3")
    installed("ia3", IA3, "ia3_adapter:Other", distribution="other")
    with pytest.raises(AdapterError, match="ia3"):
        registry.method_names()


def test_two_methods_that_recognize_an_adapter(
    installed: Install, scaled: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    installed("ia3", IA3, "ia3_adapter:Ia3")
    installed("copied", IA3, "ia3_adapter:Ia3", distribution="other")
    with pytest.raises(AdapterError, match="one method that recognizes it"):
        Adapter.open(scaled[0])


SWITCHED = """
from exporter.adapters.lora import LoraMethod

class Switched(LoraMethod):
    name, switch, settings = "switched", "use_switched", LoraMethod.settings | {"use_switched"}
"""


@pytest.mark.parametrize(("value", "method"), [(True, "switched"), (False, "lora"), (None, "lora")])
def test_switch_tells_methods_of_one_type_apart(
    installed: Install, base: Path, make_adapter: Make, tmp_path: Path, value: bool | None, method: str
) -> None:
    installed("switched", SWITCHED, "switched_adapter:Switched")
    adapter = copy(make_adapter(base), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", use_switched=value)
    assert Adapter.open(adapter).method.name == method


# --- what an update may ask for --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubled(Update):
    """Twice the base's own rows in the place of whatever is there; refuses company."""

    source: StoredTensor
    module: str = "module"
    needs_base, stacks = True, False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.source,)

    def apply(self, rows: torch.Tensor, inputs: RowInputs) -> None:
        assert inputs.base is not None
        rows.copy_(2 * inputs.base)


def test_update_is_given_the_rows_of_the_base_if_it_asks(base: Path, make_adapter: Make) -> None:
    model = merged_model(base, make_adapter(base))
    changed = next(tensor for tensor in model.tensors if tensor.updates)
    both = MergedTensor(changed.name, changed.source, (*changed.updates, Doubled(changed.source)))
    plain = MergedTensor(changed.name, changed.source)
    with TensorReader() as reader:
        merger, block = CpuMerger(reader), RowBlock(0, changed.source.rows)
        expected = 2 * merger.block(plain, block, ()).clone()
        assert torch.equal(merger.block(both, block, merger.factors(both)), expected)


ALONE = """
from exporter.adapters.lora import LoraMethod, LowRankUpdate

class Alone(LowRankUpdate):
    stacks = False

class Method(LoraMethod):
    name, switch, settings = "alone", "use_alone", LoraMethod.settings | {"use_alone"}

    def update(self, module, parts, config):
        return Alone(**vars(super().update(module, parts, config)))
"""


@pytest.mark.parametrize("first", [True, False])
def test_update_that_must_be_alone_on_its_tensor(
    installed: Install, base: Path, make_adapter: Make, tmp_path: Path, first: bool
) -> None:
    installed("alone", ALONE, "alone_adapter:Method")
    alone = copy(make_adapter(base, target_modules=["q_proj"]), tmp_path / "alone")
    edit_json(alone / "adapter_config.json", use_alone=True)
    beside, on_it = make_adapter(base, target_modules=["k_proj"]), make_adapter(base, seed=2)
    assert merged_model(base, alone, beside).updated == 2
    adapters = (alone, on_it) if first else (on_it, alone)
    (tmp_path / "exports").mkdir()
    caught = refused(UnsupportedAdapterError, tmp_path / "exports" / "out", base, *adapters)
    assert "q_proj" in caught.thing
    assert "model.layers.0.self_attn.q_proj.weight" in caught.found
