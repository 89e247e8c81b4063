"""Refusals of an adapter: each by its named error, naming the tensor or key, with nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.adapters.adapter import Adapter
from exporter.adapters.lora import HANDLED_SETTINGS, NEUTRAL_SETTINGS
from exporter.errors import (
    AdapterError,
    AdapterRankError,
    AdapterShapeError,
    AdapterTargetError,
    ArchitectureMismatchError,
    InvalidHeaderError,
    MissingFileError,
    NonFiniteTensorError,
    RefusalError,
    TruncatedFileError,
    UnsupportedAdapterError,
    ZeroDeltaError,
)
from tests.exports import refused
from tests.folders import DELETED, copy, edit_json, edit_tensors

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# gate_proj of the fixtures is (128, 64) and q_proj (64, 64); the rank is 4.
GATE = "base_model.model.model.layers.0.mlp.gate_proj.lora_{}.weight"
EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture
def base(make_base: Make) -> Path:
    return make_base()


@pytest.fixture
def adapter(base: Path, make_adapter: Make, tmp_path: Path) -> Path:
    return copy(make_adapter(base), tmp_path / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "out"


def trained(element: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[EMBEDDING][0, 7] = element

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def without(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def only_x(tensors: Tensors) -> None:
    tensors.clear()
    tensors["x"] = torch.ones(1)


def replaced(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor(tensors[name]).contiguous()})


def added(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


def both(one: Callable[[Tensors], None], other: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        one(tensors)
        other(tensors)

    return change


A, B = GATE.format("A"), GATE.format("B")
TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], None], type[RefusalError], str]] = {
    "a layer that the base lacks": (renamed("layers.1.", "layers.7."), AdapterTargetError, "layers.7."),
    "one target that the base lacks": (
        renamed("layers.0.mlp.gate_proj", "layers.0.mlp.gate_up_proj"),
        AdapterTargetError,
        "gate_up_proj",
    ),
    "no target that the base has": (renamed("model.layers", "transformer.h"), ArchitectureMismatchError, "transformer"),
    "unknown part": (added(GATE.format("C"), 4, 64), UnsupportedAdapterError, "lora_C"),
    "no prefix": (added("model.layers.0.mlp.gate_proj.lora_A.weight", 4, 64), AdapterTargetError, "gate_proj"),
    "another method": (added("base_model.model.model.layers.0.mlp.gate_proj.hada_w1_a", 4), AdapterTargetError, "hada"),
    "a bias": (added("base_model.model.model.layers.0.mlp.gate_proj.bias", 128), AdapterTargetError, "gate_proj.bias"),
    "a bias of B": (added(GATE.format("B").replace("weight", "bias"), 128), AdapterTargetError, "lora_B.bias"),
    "a saved module": (
        added("base_model.model.model.norm.modules_to_save.weight", 64),
        UnsupportedAdapterError,
        "modules_to_save",
    ),
    "the name of another adapter": (
        renamed("layers.0.mlp.gate_proj.lora_A", "layers.0.mlp.gate_proj.lora_A.mine"),
        AdapterError,
        "gate_proj",
    ),
    "only A": (without(B), AdapterError, "gate_proj"),
    "only B": (without(A), AdapterError, "gate_proj"),
    "A twice": (
        lambda tensors: tensors.update({A.removesuffix(".weight"): tensors[A].clone()}),
        AdapterError,
        "lora_A",
    ),
    "both kinds of A": (
        added(A.replace("lora_A.weight", "lora_embedding_A"), 4, 64),
        AdapterError,
        "gate_proj",
    ),
    "a layer missing": (without("layers.1."), AdapterTargetError, "model.layers.1."),
    "a target missing": (without("layers.1.mlp.up_proj"), AdapterTargetError, "model.layers.1.mlp.up_proj.weight"),
    "nothing of LoRA": (only_x, AdapterTargetError, "x"),
    "fits only by broadcasting, rows": (replaced(B, lambda b: b[:1]), AdapterShapeError, A),
    "fits only by broadcasting, columns": (replaced(A, lambda a: a[:, :1]), AdapterShapeError, A),
    "fits only transposed": (
        both(replaced(A, lambda a: torch.ones(4, 128)), replaced(B, lambda b: torch.ones(64, 4))),
        AdapterShapeError,
        A,
    ),
    "a row too many": (replaced(B, lambda b: torch.cat([b, b[:1]])), AdapterShapeError, A),
    "stored as a convolution": (replaced(A, lambda a: a[..., None]), UnsupportedAdapterError, A),
    "stored as a vector": (replaced(A, lambda a: a[0]), UnsupportedAdapterError, A),
    "A stored transposed": (replaced(A, lambda a: a.T), AdapterRankError, "gate_proj"),
    "B stored transposed": (replaced(B, lambda b: b.T), AdapterRankError, "gate_proj"),
    "rank of A": (replaced(A, lambda a: a[:3]), AdapterRankError, "gate_proj"),
    "rank of B": (replaced(B, lambda b: b[:, :3]), AdapterRankError, "gate_proj"),
    "rank of both": (
        both(replaced(A, lambda a: a[:3]), replaced(B, lambda b: b[:, :3])),
        AdapterRankError,
        "gate_proj",
    ),
    "A of zeros": (replaced(A, torch.zeros_like), ZeroDeltaError, A),
    "B of zeros": (replaced(B, torch.zeros_like), ZeroDeltaError, B),
    "B of negative zeros": (replaced(B, lambda b: -torch.zeros_like(b)), ZeroDeltaError, B),
    "a linear layer's pair for the embedding": (
        both(
            added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 9),
            added("base_model.model.model.embed_tokens.lora_embedding_B", 64, 4),
        ),
        AdapterShapeError,
        "embed_tokens",
    ),
    "an update of a norm": (
        both(
            added("base_model.model.model.norm.lora_A.weight", 4, 64),
            added("base_model.model.model.norm.lora_B.weight", 1, 4),
        ),
        AdapterShapeError,
        "model.norm",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_fault_of_a_tensor_is_refused(fault: str, base: Path, adapter: Path, out: Path) -> None:
    change, error, thing = TENSOR_FAULTS[fault]
    edit_tensors(adapter / WEIGHTS, change)
    assert thing in refused(error, out, base, adapter).thing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [A, B])
def test_value_that_is_not_finite(
    base: Path, adapter: Path, out: Path, name: str, dtype: torch.dtype, value: float
) -> None:
    def change(tensors: Tensors) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[name][2, 3] = value

    edit_tensors(adapter / WEIGHTS, change)
    assert refused(NonFiniteTensorError, out, base, adapter).thing == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_dtype_that_no_adapter_has(base: Path, adapter: Path, out: Path, dtype: torch.dtype) -> None:
    edit_tensors(adapter / WEIGHTS, replaced(A, lambda a: a.to(dtype)))
    assert refused(UnsupportedAdapterError, out, base, adapter).thing == A


# --- the configuration -----------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, Any, type[RefusalError]]] = {
    "wholly trained modules": ("modules_to_save", ["lm_head"], UnsupportedAdapterError),
    "trained tokens": ("trainable_token_indices", [3, 4], UnsupportedAdapterError),
    "parameters": ("target_parameters", ["mlp.experts.gate_up_proj"], UnsupportedAdapterError),
    "every bias": ("bias", "all", UnsupportedAdapterError),
    "bias of the targets": ("bias", "lora_only", UnsupportedAdapterError),
    "bias of B": ("lora_bias", True, UnsupportedAdapterError),
    "replicated layers": ("layer_replication", [[0, 2], [0, 2]], UnsupportedAdapterError),
    "activated LoRA": ("alora_invocation_tokens", [1, 2], UnsupportedAdapterError),
    "QA-LoRA": ("use_qalora", True, UnsupportedAdapterError),
    "kept ties": ("ensure_weight_tying", True, UnsupportedAdapterError),
    "PiSSA": ("init_lora_weights", "pissa", UnsupportedAdapterError),
    "fast PiSSA": ("init_lora_weights", "pissa_niter_16", UnsupportedAdapterError),
    "OLoRA": ("init_lora_weights", "olora", UnsupportedAdapterError),
    "CorDA": ("init_lora_weights", "corda", UnsupportedAdapterError),
    "LoftQ": ("init_lora_weights", "loftq", UnsupportedAdapterError),
    "LoRA-GA": ("init_lora_weights", "lora_ga", UnsupportedAdapterError),
    "a setting of the future": ("use_quora", True, UnsupportedAdapterError),
    "a table of the future": ("quora_config", {"a": 1}, UnsupportedAdapterError),
    "LoHa": ("peft_type", "LOHA", UnsupportedAdapterError),
    "no method": ("peft_type", DELETED, UnsupportedAdapterError),
    "a classifier": ("task_type", "SEQ_CLS", UnsupportedAdapterError),
    "another model": ("auto_mapping", {"base_model_class": "LlamaForCausalLM"}, ArchitectureMismatchError),
    "another rank": ("r", 8, AdapterRankError),
    "another rank by pattern": ("rank_pattern", {"gate_proj": 2}, AdapterRankError),
    "scale of zero": ("lora_alpha", 0, ZeroDeltaError),
    "scale of zero by pattern": ("alpha_pattern", {r"layers\.1\.mlp\.up_proj": 0}, ZeroDeltaError),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_is_refused(setting: str, base: Path, adapter: Path, out: Path) -> None:
    key, value, error = SETTINGS[setting]
    edit_json(adapter / CONFIG, **{key: value})
    caught = refused(error, out, base, adapter)
    if error is UnsupportedAdapterError:
        assert key in caught.thing


MALFORMED: dict[str, tuple[str, Any]] = {
    "rank as text": ("r", "four"),
    "no rank": ("r", None),
    "rank pattern is a list": ("rank_pattern", [4]),
    "rank pattern is no pattern": ("rank_pattern", {"(": 4}),
    "scale is not a number": ("lora_alpha", float("nan")),
    "scale is infinite": ("lora_alpha", float("inf")),
    "scale as text": ("lora_alpha", "eight"),
    "no scale": ("lora_alpha", None),
    "mapping is text": ("auto_mapping", "Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("setting", MALFORMED)
def test_malformed_setting_is_refused(setting: str, base: Path, adapter: Path) -> None:
    key, value = MALFORMED[setting]
    edit_json(adapter / CONFIG, **{key: value})
    with pytest.raises(AdapterError) as caught:
        _plan(base, adapter)
    assert key in str(caught.value)


def test_rank_of_zero(adapter: Path) -> None:
    edit_json(adapter / CONFIG, r=0)

    def empty(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor[:0] if "lora_A" in name else tensor[:, :0].contiguous()

    edit_tensors(adapter / WEIGHTS, empty)
    with pytest.raises(AdapterError):
        Adapter.open(adapter)


def test_every_setting_of_peft_is_handled_neutral_or_refused(adapter: Path) -> None:
    # A new peft brings new settings: each must be refused until somebody has looked at it.
    from peft import LoraConfig

    settings = LoraConfig().to_dict()
    for key in sorted(settings.keys() - HANDLED_SETTINGS - NEUTRAL_SETTINGS):
        assert not settings[key], f"{key} is set by default and not known here"
        edit_json(adapter / CONFIG, **{key: {"anything": 1}})
        with pytest.raises(UnsupportedAdapterError) as caught:
            Adapter.open(adapter)
        assert key in caught.value.thing
        edit_json(adapter / CONFIG, **{key: settings[key]})
    assert Adapter.open(adapter).updates


UNSUPPORTED_CONFIGS: list[dict[str, Any]] = [
    {"modules_to_save": ["norm"]},
    {"lora_bias": True},
    {"trainable_token_indices": [1, 2]},
    {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    {"init_lora_weights": "pissa"},
    {"layer_replication": [[0, 2], [0, 2]]},
]


@pytest.mark.parametrize("config", UNSUPPORTED_CONFIGS, ids=lambda config: next(iter(config)))
def test_what_peft_saves_for_an_unsupported_method(
    base: Path, make_adapter: Make, out: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    made = make_adapter(base, **config)
    refused(UnsupportedAdapterError, out, base, made)
    # And from the file alone, if the configuration has lost the setting.
    changed = copy(made, tmp_path / "changed")
    others = [name for name in load_file(changed / WEIGHTS) if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if others:
        edit_json(changed / CONFIG, **dict.fromkeys(config.keys() - {"target_modules"}))
        # What peft initializes as a copy of the base is as it would be after training.
        edit_tensors(changed / WEIGHTS, lambda tensors: tensors.update({name: tensors[name] + 1 for name in others}))
        with pytest.raises((UnsupportedAdapterError, AdapterTargetError)):
            _plan(base, changed)


def _plan(base: Path, *adapters: Path) -> Any:
    from exporter.inputs.checkpoint import Checkpoint
    from exporter.merge.model import plan_merge

    return plan_merge(Checkpoint.open(base), tuple(Adapter.open(adapter) for adapter in adapters), "merged")


# --- against the base ------------------------------------------------------------------------------------------------


def test_adapter_of_another_size_of_base(make_base: Make, make_adapter: Make, base: Path, out: Path) -> None:
    larger = make_adapter(make_base("qwen3", hidden=96))
    assert "targets do not fit" in refused(AdapterShapeError, out, base, larger).found


def test_adapter_of_a_deeper_base(make_base: Make, make_adapter: Make, base: Path, out: Path) -> None:
    deeper = make_adapter(make_base("qwen3", layers=3))
    assert "layers.2." in refused(AdapterTargetError, out, base, deeper).thing


def test_adapter_of_a_shallower_base(make_base: Make, make_adapter: Make, base: Path, out: Path) -> None:
    # Names and shapes all fit; only the list of targets tells that a layer has no update.
    shallower = make_adapter(make_base("qwen3", layers=1), target_modules=["q_proj", "v_proj"])
    assert "layers.1." in refused(AdapterTargetError, out, base, shallower).thing


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.self_attn\.(q|v)_proj"},
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": ["up_proj"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_missing_layer_however_targets_are_chosen(
    base: Path, make_adapter: Make, tmp_path: Path, out: Path, config: dict[str, Any]
) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"]} | config
    incomplete = copy(make_adapter(base, **settings), tmp_path / "incomplete")
    assert _plan(base, incomplete).updated == 4
    edit_tensors(incomplete / WEIGHTS, without("layers.1."))
    refused(AdapterTargetError, out, base, incomplete)


def test_targets_of_some_layers_only(base: Path, make_adapter: Make) -> None:
    some = make_adapter(base, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    updated = {tensor.name for tensor in _plan(base, some).tensors if tensor.updates}
    assert updated == {f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qv"}


def test_second_adapter_is_checked_too(base: Path, adapter: Path, make_adapter: Make, out: Path) -> None:
    edit_tensors(adapter / WEIGHTS, replaced(B, torch.zeros_like))
    assert refused(ZeroDeltaError, out, base, make_adapter(base), adapter).thing == B


# --- embeddings saved along ------------------------------------------------------------------------------------------

COPY_FAULTS: dict[str, Callable[[Tensors], None]] = {
    "one value trained": trained(1.0),
    "one value NaN": trained(float("nan")),
    "resized": replaced(EMBEDDING, lambda weight: torch.cat([weight, weight[:1]])),
    "of a module that the base lacks": renamed(EMBEDDING, "base_model.model.model.embed_positions.base_layer.weight"),
}


def test_copy_of_the_embedding_is_no_update(base: Path, make_adapter: Make) -> None:
    model = _plan(base, make_adapter(base, target_modules=["q_proj", "embed_tokens"]))
    assert set(model.adapters[0].copies) == {"model.embed_tokens"}


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_copy_that_is_none_is_refused(fault: str, base: Path, make_adapter: Make, tmp_path: Path, out: Path) -> None:
    made = copy(make_adapter(base, target_modules=["q_proj", "embed_tokens"]), tmp_path / "changed")
    edit_tensors(made / WEIGHTS, COPY_FAULTS[fault])
    assert "base_layer" in refused(UnsupportedAdapterError, out, base, made).thing


# --- the files -------------------------------------------------------------------------------------------------------


def test_weights_that_are_pickled(base: Path, adapter: Path, out: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert refused(MissingFileError, out, base, adapter).found == "adapter_model.bin"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_file_that_is_missing(base: Path, adapter: Path, out: Path, name: str) -> None:
    (adapter / name).unlink()
    assert name in str(refused(MissingFileError, out, base, adapter))


def test_weights_that_are_truncated(base: Path, adapter: Path, out: Path) -> None:
    os.truncate(adapter / WEIGHTS, (adapter / WEIGHTS).stat().st_size - 1)
    assert WEIGHTS in refused(TruncatedFileError, out, base, adapter).thing


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff{}"])
def test_config_that_is_none(base: Path, adapter: Path, out: Path, content: str) -> None:
    (adapter / CONFIG).write_text(content)
    assert CONFIG in refused(InvalidHeaderError, out, base, adapter).thing


def test_weights_without_any_tensor(base: Path, adapter: Path, out: Path) -> None:
    save_file({}, adapter / WEIGHTS)
    refused(AdapterError, out, base, adapter)
