"""What a GPTQ folder says of its packed matrices, held against the tensors that it stores.

Our reader judges our folders here. GPTQModel's folders are a witness (slow), and the independent unpacking reads ours
in test_backend.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.backends.registry import load_backend
from exporter.merge.model import MergedModel
from tests.exports import export_to
from tests.folders import DELETED, copy, edit_json, edit_tensors
from tests.gptq import make_gptq, needs_gptqmodel
from tests.merged import merged_model
from tests.tour.walk.test_walk import make_experts

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

FORCED = {"force_unservable": "true"}
SMALL: dict[str, Any] = {"calibration": {"tokens": 512, "window": 64}}
ATTENTION = "model.layers.1.self_attn"
MODULE = f"{ATTENTION}.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
PLACE = "config.json: quantization_config"


def faults(model: MergedModel, folder: Path, quant: str = "gptq-int4-g32") -> list[str]:
    reader = load_backend("gptq").read(model, quant, folder)
    assert reader is not None
    reader.close()
    return list(reader.faults)


# --- sound folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("gptq-int4-g32", {"max_shard_size": "40KB"}),
        ("gptq-int8-gall", {"sym": "false", "checkpoint_format": "gptq_v2"}),
        ("gptq-int3-g32", {"desc_act": "true"}),
        ("gptq-int2-g64", {"sym": "false", "desc_act": "true"}),
        ("gptq-int4-gall", {"desc_act": "true"}),
        (
            "gptq-int4-g32",
            {
                "overrides": {
                    r".*\.self_attn\.[qkv]_proj": {"bits": 8, "group_size": 64, "sym": False},
                    r".*layers\.1\.mlp\..*": None,
                    r".*\.o_proj": {"desc_act": True},
                    r".*layers\.0\.mlp\.down_proj": {"damp": 0.2},
                }
            },
        ),
    ],
    ids=["shards", "asymmetric-v2", "desc_act", "asymmetric-desc_act", "one-group-desc_act", "overrides"],
)
def test_a_sound_folder_has_no_fault(
    make_base: Make, make_adapter: Make, tmp_path: Path, quant: str, options: dict[str, Any]
) -> None:
    base = make_base("qwen3", tied=False)
    adapter, forced = make_adapter(base), options | FORCED
    export_to(tmp_path / "out", base, adapter, format="gptq", quant=quant, options=forced, **SMALL)
    assert faults(merged_model(base, adapter), tmp_path / "out", quant) == []


@pytest.mark.parametrize("overrides", [{}, {r".*layers\.0\..*experts\..*": {"bits": 8}, r".*layers\.2\.mlp\..*": None}])
def test_sound_experts_have_no_fault(tmp_path: Path, overrides: dict[str, Any]) -> None:
    base = make_experts(tmp_path / "base", hidden=128)
    export_to(tmp_path / "out", base, format="gptq", quant="gptq-int4-g32", options={"overrides": overrides}, **SMALL)
    assert faults(merged_model(base), tmp_path / "out") == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_folder_of_rounded_matrices_has_no_fault(tmp_path: Path, bits: int, written: Any, sym: bool) -> None:
    made, _ = make_gptq(tmp_path, bits=bits, checkpoint_format=written, sym=sym)
    assert faults(merged_model(tmp_path / "base"), made, f"gptq-int{bits}-g32") == []


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize(
    ("quant", "options"),
    [("int4-g32", {}), ("int8-g32", {"sym": "false", "desc_act": "true", "max_shard_size": "60KB"} | FORCED)],
)
def test_a_folder_that_gptqmodel_wrote_has_no_fault(
    make_base: Make, tmp_path: Path, quant: str, options: dict[str, Any]
) -> None:
    base = make_base("qwen3", tied="desc_act" not in options)
    export_to(tmp_path / "out", base, format="gptqmodel", quant=(quant,), options=options, **SMALL)
    assert faults(merged_model(base), tmp_path / "out", f"gptq-{quant}") == []


# --- values that contradict each other -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergedModel, Path]:
    """A folder of rounded matrices and its model; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("stated")
    made, _ = make_gptq(folder)
    return merged_model(folder / "base"), made


def configured(folder: Path, **changes: Any) -> None:
    """Change `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    values = config["quantization_config"] | {key: value for key, value in changes.items() if value is not DELETED}
    config["quantization_config"] = {key: value for key, value in values.items() if changes.get(key) is not DELETED}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"quant_method": "awq"}, [f'{PLACE}.quant_method is "awq" and should be "gptq"']),
        ({"quant_method": DELETED}, [f'{PLACE}.quant_method is missing and should be "gptq"']),
        ({"checkpoint_format": "marlin"}, [f'{PLACE}.checkpoint_format is "marlin" and should be "gptq" or "gptq_v2"']),
        ({"format": "gptq_v2"}, [f'{PLACE}.format is "gptq_v2" and checkpoint_format is "gptq"']),
        ({"pack_dtype": "int16"}, [f'{PLACE}.pack_dtype is "int16" and should be "int32"']),
        ({"sym": DELETED}, [f"{PLACE}.sym is missing and should be true or false"]),
        ({"desc_act": 0}, [f"{PLACE}.desc_act is 0 and should be true or false"]),
        ({"sym": False}, [f"{PLACE}.sym is false, and every zero point is in the middle"]),
        ({"desc_act": True}, [f"{PLACE}.desc_act is true, and every g_idx numbers groups in order"]),
        ({"lm_head": True}, [f"{PLACE}.lm_head is true, and lm_head is not packed"]),
        ({"dynamic": []}, [f"{PLACE}.dynamic is [] and should be rules by pattern"]),
        ({"dynamic": {"-:(": {}}}, [f"{PLACE}.dynamic: '-:(' is no regular expression"]),
        (
            {"dynamic": {"+:.*o_proj": {"bits": "8"}}},
            [f"""{PLACE}.dynamic: '+:.*o_proj' is {{"bits": "8"}} and should be settings"""],
        ),
    ],
)
def test_a_value_that_the_tensors_contradict_is_named(
    sound: tuple[MergedModel, Path], tmp_path: Path, changes: dict[str, Any], reasons: list[str]
) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    configured(folder, **changes)
    found = faults(model, folder)
    assert len(found) == len(reasons), found
    assert all(one.startswith(reason) for one, reason in zip(found, reasons, strict=True)), found


def test_zero_points_of_the_other_format_are_named(sound: tuple[MergedModel, Path], tmp_path: Path) -> None:
    """Codes of v1 under the name of v2 are all off by one."""
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    configured(folder, checkpoint_format="gptq_v2")
    found = faults(model, folder)
    assert found[0].endswith(f"has zero points beside the middle, and {PLACE}.sym is true")
    assert found[3] == "so it is with 11 more tensors"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: tensors.update({f"{MODULE}.qzeros": tensors[f"{MODULE}.qzeros"] + 1}),
            f"{MODULE} has zero points beside the middle, and {PLACE}.sym is true",
        ),
        (
            lambda tensors: tensors.update({f"{MODULE}.g_idx": tensors[f"{MODULE}.g_idx"].flip(0).contiguous()}),
            f"{MODULE}.g_idx does not number groups in order, and {PLACE}.desc_act is false",
        ),
        (
            lambda tensors: tensors.update({"model.more.weight": torch.zeros(2)}),
            "model.more.weight is not a tensor of the model",
        ),
        (
            lambda tensors: tensors.update({f"{MODULE}.weight": torch.zeros(64, 64)}),
            f"{MODULE}.weight is not a tensor of the model",
        ),
    ],
)
def test_a_tensor_that_the_configuration_contradicts_is_named(
    sound: tuple[MergedModel, Path], tmp_path: Path, change: Callable[[Tensors], None], reason: str
) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    edit_tensors(folder / "model.safetensors", change)
    assert faults(model, folder) == [reason]


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"bits": 8}, ["quantize_config.json: bits is 8 and 4 in config.json"]),
        ({"sym": False, "group_size": -1}, ["group_size is -1 and 32 in config.json", "sym is false and true"]),
        ({"desc_act": DELETED}, ["desc_act is null and false in config.json"]),
        ({"dynamic": {"-:.*": {}}}, ['dynamic is {"-:.*": {}} and null in config.json']),
        ({"checkpoint_format": "gptq_v2"}, ["checkpoint_format is"]),
        ({"quant_method": DELETED, "damp_percent": 0.5}, []),
    ],
)
def test_the_file_for_older_readers_says_the_same(
    sound: tuple[MergedModel, Path], tmp_path: Path, changes: dict[str, Any], reasons: list[str]
) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "quantize_config.json").write_text(json.dumps(said))
    assert faults(model, folder) == []
    edit_json(folder / "quantize_config.json", **changes)
    found = faults(model, folder)
    assert len(found) == len(reasons)
    assert all(reason in one for one, reason in zip(found, reasons, strict=True)), found


# --- which matrices are packed ---------------------------------------------------------------------------------------


def unpacked(tensors: Tensors) -> None:
    """Leave a matrix in 16 bits."""
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{DOWN}.{part}"]
    tensors[f"{DOWN}.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)


def test_a_matrix_that_was_left_in_16_bits_is_named(sound: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    edit_tensors(folder / "model.safetensors", unpacked)
    assert faults(model, folder) == [
        f"{DOWN} is in 16 bits and should be packed: no rule of {PLACE}.dynamic keeps it so"
    ]
    configured(folder, dynamic={f"-:{DOWN}": {}})
    assert faults(model, folder) == []


def test_a_rule_that_keeps_packed_matrices_is_named(sound: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    configured(folder, dynamic={r"-:.*\.1\.mlp\.": {}, "+:.*down_proj": {"bits": 8}})
    found = faults(model, folder)
    kept = [
        f"model.layers.1.mlp.{name}_proj is packed, and {PLACE}.dynamic keeps it" for name in ("down", "gate", "up")
    ]
    assert all(one.startswith(reason) for one, reason in zip(sorted(found[:3]), kept, strict=True))
    assert found[3:] == [
        "model.layers.0.mlp.down_proj has 4 bits in 4 groups and should have 8 in 4, by config.json"
    ]  # fmt: skip


def test_a_folder_without_packed_matrices_is_named(sound: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model = sound[0]
    folder = copy(sound[1].parent / "plain", tmp_path / "out")
    said = json.loads((sound[1] / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=said | {"dynamic": {"-:.*": {}}})
    assert faults(model, folder) == ["no matrix of a decoder layer is packed"]


def test_a_packed_head_is_named_unless_the_configuration_says_so(
    sound: tuple[MergedModel, Path], tmp_path: Path
) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")

    def pack_head(tensors: Tensors) -> None:
        rows, columns = tensors.pop("lm_head.weight").shape
        tensors["lm_head.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors["lm_head.qzeros"] = torch.zeros(2, rows // 8, dtype=torch.int32)
        tensors["lm_head.scales"] = torch.ones(2, rows, dtype=torch.float16)
        tensors["lm_head.g_idx"] = torch.arange(columns, dtype=torch.int32) // 32

    edit_tensors(folder / "model.safetensors", pack_head)
    assert faults(model, folder) == [f"{PLACE}.lm_head is false, and lm_head is packed"]
    configured(folder, lm_head=True)
    assert faults(model, folder) == []


@pytest.mark.parametrize(
    ("rule", "others"),
    [
        (r"+:^model\.layers\.1\.self_attn\.[qkv]_proj$", f"k_proj than of {ATTENTION}.qkv_proj"),
        (r"+:^model\.layers\.1\.self_attn\.q", f"k_proj than of {ATTENTION}.q_proj"),
    ],
)
def test_rules_that_part_what_vllm_makes_one_are_named(
    sound: tuple[MergedModel, Path], tmp_path: Path, rule: str, others: str
) -> None:
    model, folder = sound[0], copy(sound[1], tmp_path / "out")
    configured(folder, dynamic={rule: {"desc_act": True}})
    found = faults(model, folder)
    assert found[0] == f"{PLACE}.dynamic says other things of {ATTENTION}.{others}, of which vLLM makes one"
    configured(folder, dynamic={r"+:^model\.layers\.1\.self_attn\.(?:[qkv]|qkv)_proj$": {"bits": 4}})
    assert faults(model, folder) == []
