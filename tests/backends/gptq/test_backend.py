"""The GPTQ backend: what its plan says and refuses, and the folders that it writes."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from exporter import Execution, export, make_plan
from exporter.backends.base import Solution
from exporter.backends.gptq.backend import GptqBackend
from exporter.backends.gptq.bit_packing import Packed, unpack
from exporter.backends.gptq.names import QUANTS, parse_quant, quant_name
from exporter.backends.gptq.plan import GptqPlan
from exporter.backends.gptq.writer import GptqWriter
from exporter.cli.verdict_table import show_verdicts
from exporter.errors import BackendError, RecipeError, UnknownQuantizationError, UnservableError, UnsupportedModelError
from exporter.inputs.checkpoint import INDEX_NAME
from exporter.merge.model import MergedModel
from exporter.plan.reporter import Reporter
from tests.exports import export_to, merge_with_us, recipe, refused
from tests.folders import edit_tensors, hashes, model_tensors
from tests.gptq import unpack_script
from tests.merged import merged_model
from tests.tour.walk.test_walk import make_experts

Make = Callable[..., Path]

# Rows of 256 columns have two groups of 128.
WIDE: dict[str, Any] = {"hidden": 256, "intermediate": 384, "heads": 4, "kv_heads": 2, "head_dim": 64}
SMALL: dict[str, Any] = {"calibration": {"tokens": 512, "window": 64}}
FORCED = {"force_unservable": "true"}


@pytest.fixture(scope="session")
def base(make_base: Make) -> Path:
    return make_base("qwen3", **WIDE)


@pytest.fixture(scope="session")
def model(base: Path) -> MergedModel:
    return merged_model(base)


def plan_of(model: MergedModel, quant: str = "gptq-int4-g128", **options: Any) -> GptqPlan:
    plan = GptqBackend().plan(model, quant, options)
    assert isinstance(plan, GptqPlan)
    return plan


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Every packed matrix of a folder: float32 (out, in), by its module."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = model_tensors(folder)
    found = {}
    for name in (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        bits = config["bits"]
        for pattern, rule in config.get("dynamic", {}).items():
            if re.match(pattern.removeprefix("+:"), name):
                bits = rule["bits"]
        packed = Packed(*(stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")))
        unpacked = unpack(packed, bits, config["checkpoint_format"])
        group = unpacked.g_idx.long()
        codes = unpacked.codes.float() - unpacked.zeros.float()[:, group]
        found[name] = codes * unpacked.scales[:, group]
    return found


# --- names and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
def test_short_forms_are_read_back(quant: str) -> None:
    parsed = parse_quant(quant)
    assert parsed is not None
    assert quant_name(*parsed) == quant
    assert parse_quant(quant.removeprefix("gptq-").upper()) == parsed


@pytest.mark.parametrize("quant", ["int5-g128", "gptq-int4-g16", "gptq-int4", "Q4_K_M", "gptq-int4-g-1", ""])
def test_other_types_are_refused(model: MergedModel, quant: str) -> None:
    with pytest.raises(UnknownQuantizationError):
        plan_of(model, quant)


@pytest.mark.parametrize(
    "options",
    [
        {"bit": 4}, {"bits": 5}, {"bits": "four"}, {"group_size": 100}, {"damp": -1}, {"damp": "nan"},
        {"sym": "perhaps"}, {"checkpoint_format": "v2"}, {"overrides": {"(": {"bits": 8}}},
        {"overrides": {".*": {"bit": 8}}},
        {"overrides": "{"}, {"overrides": {"nothing": {"bits": 8}}}, {"overrides": {".*q_proj": {"bits": 8}}},
        {"overrides": {".*": None}}, {"max_shard_size": "many"},
    ],
)  # fmt: skip
def test_other_options_are_refused(model: MergedModel, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        plan_of(model, **options)


def test_options_take_the_place_of_the_short_form(model: MergedModel) -> None:
    plan = plan_of(model, bits="8", group_size="32")
    assert plan.quant == "gptq-int8-g32"
    assert plan == plan_of(model, "int8-g32")


@pytest.mark.parametrize(
    ("quant", "options", "reason"),
    [
        ("gptq-int3-g128", {}, "3 bits"),
        ("gptq-int2-g64", {}, "2 bits"),
        ("gptq-int4-g128", {"sym": "false"}, "zero points"),
        ("gptq-int4-g128", {"desc_act": "true"}, "desc_act"),
        ("gptq-int4-g128", {"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ("gptq-int4-g128", {"overrides": {".*mlp.*": {"bits": 2}}}, "2 bits"),
        # vLLM checks what the configuration says of all, even if no matrix is quantized so.
        ("gptq-int2-g128", {"overrides": {".*": {"bits": 4}}}, "2 bits"),
    ],
)
def test_what_no_server_takes_is_refused(model: MergedModel, quant: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnservableError) as caught:
        plan_of(model, quant, **options)
    assert reason in caught.value.found
    forced = plan_of(model, quant, **options, **FORCED)
    assert forced.runtimes == (() if "overrides" in options else ("transformers",))
    assert any(reason in note for note in forced.notes)


@pytest.mark.parametrize("quant", ["gptq-int4-g128", "gptq-int8-g32", "gptq-int4-gall"])
def test_what_vllm_serves(model: MergedModel, quant: str) -> None:
    plan = plan_of(model, quant)
    assert plan.runtimes == ("vllm", "transformers")
    assert any("vLLM serves it" in note for note in plan.notes)


def test_with_one_group_the_order_of_columns_does_not_matter(model: MergedModel) -> None:
    assert plan_of(model, "gptq-int4-gall", desc_act="true").runtimes == ("vllm", "transformers")


def test_rows_that_fill_no_group_are_refused(make_base: Make) -> None:
    model = merged_model(make_base("qwen2", hidden=96, intermediate=352))
    with pytest.raises(UnsupportedModelError) as caught:
        plan_of(model)
    assert caught.value.thing.endswith("proj.weight")
    assert plan_of(model, "gptq-int4-g32").quant == "gptq-int4-g32"


def test_head_embedding_norms_and_routers_stay_in_16_bits(tmp_path: Path) -> None:
    model = merged_model(make_experts(tmp_path / "base"))
    plan = plan_of(model, "gptq-int4-g32")
    kept = {tensor.name for tensor in plan.tensors if not plan.schemes.keys() & set(tensor.sources)}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"} <= kept
    assert not [name for name in kept if "_proj" in name]
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in plan.calibrated


# --- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experts(tmp_path_factory.mktemp("experts") / "base", hidden=128)


def test_transformers_is_not_promised_for_packed_experts(experts: Path) -> None:
    model = merged_model(experts)
    plan = plan_of(model, "gptq-int4-g32")
    assert plan.runtimes == ("vllm",)
    assert any(one.experts for one in plan.packed)
    assert any("transformers" in note and "experts" in note for note in plan.notes)
    forced = plan_of(model, "gptq-int3-g32", **FORCED)
    assert forced.runtimes == ()
    assert any("transformers does not load it" in note for note in forced.notes)
    kept = plan_of(model, "gptq-int4-g32", overrides={r".*\.experts\..*": None})
    assert not any(one.experts for one in kept.packed)
    assert kept.runtimes == ("vllm",)


def test_packed_experts_that_nothing_here_can_score_are_refused(experts: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"format": "gptq", "quant": "gptq-int4-g32", "verify": True, **SMALL}
    values["evaluation"] = {"tokens": 64, "n_ctx": 64}
    caught = refused(RecipeError, tmp_path / "out", experts, **values)
    assert "make serve-env" in caught.remedy
    assert "--no-verify" in caught.remedy
    assert "transformers" not in caught.remedy
    assert (
        make_plan(recipe(experts, [], tmp_path / "out", **values | {"verify": False}), Execution()).folders[0].runtimes
        == {}
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {r".*experts\.0\..*": {"bits": 8}},
        {r".*experts\.0\..*": None},
        {r".*experts\..*\.down_proj": {"bits": 8}},
        {r".*experts\..*\.(gate|up)_proj": {"group_size": -1}},
    ],
)
def test_experts_of_a_layer_must_be_treated_alike(experts: Path, overrides: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(merged_model(experts), "gptq-int4-g32", overrides=overrides)
    assert caught.value.thing.endswith("model.layers.0.mlp.experts")


def test_rules_for_experts_have_the_name_that_vllm_asks_for(experts: Path) -> None:
    overrides = {r".*layers\.0\..*experts\..*": {"bits": 8}, r".*layers\.2\.mlp\..*": None}
    plan = plan_of(merged_model(experts), "gptq-int4-g32", overrides=overrides)
    dynamic = json.loads(plan.documents["config.json"])["quantization_config"]["dynamic"]
    (eight,) = (pattern[2:] for pattern in dynamic if pattern.startswith("+:"))
    (kept,) = (pattern[2:] for pattern in dynamic if pattern.startswith("-:"))
    for pattern, layer in ((eight, 0), (kept, 2)):
        for name in ("experts", "experts.0.up_proj", "experts.7.down_proj"):
            assert re.match(pattern, f"model.layers.{layer}.mlp.{name}")
            assert not re.match(pattern, f"model.layers.{2 - layer}.mlp.{name}")
        assert not re.match(pattern, f"model.layers.{layer}.mlp.gate")
    assert plan.schemes["model.layers.0.mlp.experts.3.gate_proj.weight"].bits == 8


def test_rules_for_experts_that_vllm_would_not_look_at_are_refused(tmp_path: Path) -> None:
    """Its Marlin kernel takes experts with inputs of whole 128s; for others it knows no rules."""
    model = merged_model(make_experts(tmp_path / "base"))
    assert plan_of(model, "gptq-int4-g32").runtimes == ("vllm",)
    for override in ({"bits": 8}, None):
        with pytest.raises(UnservableError, match="experts"):
            plan_of(model, "gptq-int4-g32", overrides={r".*\.experts\..*": override})


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("gptq-int4-g128", {}),
        ("gptq-int8-g32", {}),
        ("gptq-int4-gall", {}),
        ("gptq-int3-g64", FORCED),
        ("gptq-int2-g32", FORCED | {"sym": "false"}),
        ("gptq-int4-g128", FORCED | {"desc_act": "true"}),
        ("gptq-int4-g128", FORCED | {"checkpoint_format": "gptq_v2", "sym": "false"}),
    ],
)
def test_values_are_near_the_merged_ones(
    base: Path, make_adapter: Make, tmp_path: Path, quant: str, options: dict[str, Any]
) -> None:
    adapter = make_adapter(base)
    result = export_to(tmp_path / "out", base, adapter, format="gptq", quant=quant, options=options, **SMALL)
    merged = merge_with_us(tmp_path / "merged", base, adapter)
    found = dequantized(tmp_path / "out")
    assert {f"{name}.weight" for name in found} == {name for name in merged if "_proj" in name}
    bits = int(quant.removeprefix("gptq-int")[0])
    for name, values in found.items():
        weight = merged[f"{name}.weight"]
        # Uniform steps over about six standard deviations.
        allowed = 6 / 2**bits
        assert ((values - weight).std() / weight.std()).item() < allowed
    for name, kept in model_tensors(tmp_path / "out").items():
        if name in merged:
            assert torch.equal(kept, merged[name].bfloat16())
    figures = result.folders[0].manifest["artifacts"][0]["quantization"]
    assert figures["matrices"] == len(found)
    assert figures["rounded"] == []
    assert set(figures["losses"]) == {f"{name}.weight" for name in found}


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("gptq-int4-g128", {}),
        ("gptq-int3-g64", FORCED | {"desc_act": "true"}),
        ("gptq-int4-g128", FORCED | {"checkpoint_format": "gptq_v2", "sym": "false"}),
    ],
)
def test_the_independent_unpacking_reads_the_same_values(
    base: Path, tmp_path: Path, quant: str, options: dict[str, Any]
) -> None:
    """By numpy and the description of the format, without the code that packed: to the bit."""
    export_to(tmp_path / "out", base, format="gptq", quant=quant, options=options, **SMALL)
    theirs = dict(unpack_script().unpacked_tensors(tmp_path / "out"))
    ours = dequantized(tmp_path / "out")
    assert len(ours) == 14
    for name, values in ours.items():
        assert np.array_equal(values.numpy(), theirs[f"{name}.weight"]), name


def test_configuration(base: Path, tmp_path: Path) -> None:
    export_to(tmp_path / "out", base, format="gptq", **SMALL)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    expected = {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    assert expected.items() <= quantization.items()
    assert "dynamic" not in quantization
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == quantization
    assert config["dtype"] == "bfloat16"
    g_idx = model_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.g_idx"]
    assert g_idx.tolist() == [column // 128 for column in range(384)]


def test_overrides(base: Path, tmp_path: Path) -> None:
    overrides = {r".*\.self_attn\.[qkv]_proj": {"bits": 8, "group_size": 32}, r".*layers\.1\.mlp\..*": None}
    export_to(tmp_path / "out", base, format="gptq", options={"overrides": overrides}, **SMALL)
    names = {name.rpartition(".")[0] for name in model_tensors(tmp_path / "out") if name.endswith(".qweight")}
    assert not [name for name in names if "layers.1.mlp" in name]
    assert model_tensors(tmp_path / "out")["model.layers.0.self_attn.v_proj.scales"].shape[0] == 256 // 32
    assert plan_of(merged_model(base), overrides=overrides).runtimes == ("vllm",)
    dynamic = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    (eight,) = (pattern for pattern in dynamic if pattern.startswith("+:"))
    (kept,) = (pattern for pattern in dynamic if pattern.startswith("-:"))
    assert dynamic[eight]["bits"] == 8
    for pattern, names_of in (
        (eight, ("self_attn.q_proj", "self_attn.qkv_proj")), (kept, ("mlp.gate_up_proj", "mlp.down_proj")),
    ):  # fmt: skip
        for name in names_of:
            assert re.match(pattern[2:], f"model.layers.1.{name}")
    assert not re.match(kept[2:], "model.layers.0.mlp.down_proj")
    assert not re.match(eight[2:], "model.layers.0.self_attn.o_proj")
    assert len(dequantized(tmp_path / "out")) == 7 + 4


def test_shards(base: Path, tmp_path: Path) -> None:
    export_to(tmp_path / "one", base, format="gptq", **SMALL)
    export_to(tmp_path / "many", base, format="gptq", options={"max_shard_size": "200KB"}, **SMALL)
    one, many = model_tensors(tmp_path / "one"), model_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == many.keys()


def test_true_sequential_is_another_solution(base: Path, tmp_path: Path) -> None:
    export_to(tmp_path / "one", base, format="gptq", **SMALL)
    export_to(tmp_path / "other", base, format="gptq", options={"true_sequential": "true"}, **SMALL)
    one, other = dequantized(tmp_path / "one"), dequantized(tmp_path / "other")
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one[first], other[first])
    assert not torch.equal(one["model.layers.0.self_attn.o_proj"], other["model.layers.0.self_attn.o_proj"])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_do_not_depend_on_threads(base: Path, make_adapter: Make, tmp_path: Path, threads: int) -> None:
    for name, count in (("two", 2), ("other", threads)):
        export_to(tmp_path / name, base, make_adapter(base), format="gptq", name="m", threads=count, **SMALL)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "other")


class Kill(Reporter):
    """Ends a run after some layers."""

    def __init__(self, layers: int) -> None:
        self.layers, self.seen = layers, [0]

    def layer(self, done: int, layers: int) -> None:
        self.seen.append(done)
        if done == self.layers:
            raise KeyboardInterrupt


@pytest.mark.parametrize("layers", [1, 2])
def test_a_killed_run_goes_on_with_the_same_bytes(
    base: Path, make_adapter: Make, tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base)
    values: dict[str, Any] = {"format": "gptq", "name": "m", **SMALL}
    export_to(tmp_path / "whole", base, adapter, **values)
    broken = recipe(base, [adapter], tmp_path / "broken", **values)
    with pytest.raises(KeyboardInterrupt):
        export(broken, Execution(device="cpu"), Kill(layers))
    assert not (tmp_path / "broken").exists()
    solved: list[str] = []
    solve = GptqWriter.solve

    def counting(self: GptqWriter, weights: Any, moments: Any) -> Any:
        solved.extend(weights)
        return solve(self, weights, moments)

    monkeypatch.setattr(GptqWriter, "solve", counting)
    assert export(broken, Execution(device="cpu")).passed
    assert len(solved) == 7 * (2 - layers)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")


def test_other_tokens_do_not_go_on_from_an_earlier_run(base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"format": "gptq", "name": "m"}
    broken = recipe(base, [], tmp_path / "out", **values, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        export(broken, Execution(device="cpu"), Kill(1))
    other = {"calibration": SMALL["calibration"] | {"seed": 1}}
    seen = Kill(99)
    export(recipe(base, [], tmp_path / "out", **values, **other), Execution(device="cpu"), seen)
    export_to(tmp_path / "whole", base, **values, **other)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "out")


def test_experts_that_saw_too_little_are_rounded_and_named(tmp_path: Path) -> None:
    base = make_experts(tmp_path / "base")
    few: dict[str, Any] = {"calibration": {"tokens": 256, "window": 64}}
    result = export_to(tmp_path / "out", base, format="gptq", quant="gptq-int4-g32", **few)
    figures = result.folders[0].manifest["artifacts"][0]["quantization"]
    assert figures["rounded"]
    assert all("experts" in name for name in figures["rounded"])
    for name, tokens in figures["tokens"].items():
        assert (tokens < 128) == (name in figures["rounded"])
    assert figures["matrices"] == sum("_proj" in name for name in figures["tokens"]) == 3 * 4 + 3 + 2 * 8 * 3


def test_a_matrix_that_was_never_solved_for_ends_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model does not call a module that its files have: the folder would hold zeros for it."""
    lost = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    solve = GptqWriter.solve

    def losing(self: GptqWriter, weights: Any, moments: Any) -> Solution:
        solution = solve(self, weights, moments)
        return replace(solution, findings=tuple(one for one in solution.findings if one.name not in lost))

    monkeypatch.setattr(GptqWriter, "solve", losing)
    with pytest.raises(BackendError) as caught:
        export_to(tmp_path / "out", base, format="gptq", **SMALL)
    assert caught.value.thing == lost[0]
    assert caught.value.found == "2 matrices that were never solved for"
    assert caught.value.expected == "all 14 of the plan"
    assert caught.value.exit_status == 1
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused_with_the_number_that_is_needed(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.\n" * 20)
    (tmp_path / "work").mkdir()
    values: dict[str, Any] = {"format": "gptq", "calibration": {"text": text, "tokens": 4096, "window": 64}}
    caught = refused(RecipeError, tmp_path / "work" / "out", base, **values)
    assert str(4096 + 4096) in caught.expected


def test_fewer_calibration_tokens_than_are_solved_for_are_refused(base: Path, tmp_path: Path) -> None:
    """All matrices would be rounded, which nobody asks for by this format."""
    (tmp_path / "work").mkdir()
    values: dict[str, Any] = {"format": "gptq", "calibration": {"tokens": 112, "window": 16}}
    caught = refused(RecipeError, tmp_path / "work" / "out", base, **values)
    assert caught.thing == "--calibration-tokens"
    assert caught.expected == "at least 128"
    make_plan(recipe(base, [], tmp_path / "out", format="gptq", calibration={"tokens": 128, "window": 16}), Execution())


def test_what_had_to_be_damped_more_is_named(base: Path, tmp_path: Path) -> None:
    """Without damping, 128 inputs give no positive definite Hessian of 256 columns."""
    few: dict[str, Any] = {"calibration": {"tokens": 128, "window": 64}, "options": {"damp": 0}}
    result = export_to(tmp_path / "out", base, format="gptq", **few)
    figures = result.folders[0].manifest["artifacts"][0]["quantization"]
    assert "model.layers.0.self_attn.q_proj.weight" in figures["damped_more"]
    assert set(figures["damped_more"].values()) <= {0.01 * 2**count for count in range(12)}
    out = io.StringIO()
    show_verdicts(Console(file=out, width=200), result)
    assert f"{len(figures['damped_more'])} of 14 matrices had to be damped more" in out.getvalue()
    assert "were rounded" not in out.getvalue()


def test_layers_beside_the_decoder_s_stay_in_16_bits(base: Path, tmp_path: Path) -> None:
    """Those that predict further tokens: the model's own code does not walk through them."""
    extended = tmp_path / "base"
    shutil.copytree(base, extended)
    name = "mtp.layers.0.self_attn.q_proj.weight"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors["model.layers.0.self_attn.q_proj.weight"].clone()

    edit_tensors(extended / "model.safetensors", add)
    export_to(tmp_path / "out", extended, format="gptq", **SMALL)
    stored = model_tensors(tmp_path / "out")
    assert torch.equal(stored[name], model_tensors(extended)[name])
    assert sum(key.endswith(".qweight") for key in stored) == 14
