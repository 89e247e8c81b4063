"""The merge against peft's own float32 merge, and against peft's unmerged forward where peft cannot merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter import Recipe, export
from exporter.errors import NonFiniteTensorError, OverflowRefusedError
from exporter.recipe import Execution
from tests.exports import export_to, merge_with_us, refused
from tests.folders import copy, edit_json, edit_tensors, hashes, model_tensors, raw_bytes
from tests.peft_merge import assert_same_merge, merge_with_peft, with_peft

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

RAGGED = {"hidden": 96, "intermediate": 200, "heads": 3, "kv_heads": 1, "head_dim": 24}
SOME_RANKS = {"r": 6, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 9, "layers.0.mlp.up_proj": 1}}
SOME_ALPHAS = {"lora_alpha": 3, "alpha_pattern": {"self_attn.v_proj": 16, r"layers\.0\..*_proj": 5, "down_proj": 0.5}}

# Options of the base, then the configuration of each adapter.
VARIANTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "LoRA": ({}, [{}]),
    "LoRA, qwen2 with biases": ({"family": "qwen2"}, [{}]),
    "LoRA, ragged shapes": (RAGGED, [{"r": 5}]),
    "rsLoRA": ({}, [{"use_rslora": True, "r": 7}]),
    "rank pattern": ({}, [SOME_RANKS]),
    "alpha pattern": ({}, [SOME_ALPHAS]),
    "rank and alpha patterns, rsLoRA": (RAGGED, [SOME_RANKS | SOME_ALPHAS | {"use_rslora": True}]),
    "two targets": ({}, [{"target_modules": ["q_proj", "down_proj"]}]),
    "targets by pattern": ({}, [{"target_modules": r".*layers\.1\..*\.(gate|up)_proj"}]),
    "some layers": ({}, [{"target_modules": ["v_proj"], "layers_to_transform": [1]}]),
    "all but some": ({}, [{"target_modules": ["v_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]}]),
    "untied head": ({"tied": False}, [{"target_modules": ["q_proj", "lm_head"]}]),
    "untied embedding": ({"tied": False}, [{"target_modules": ["q_proj", "embed_tokens"]}]),
    "untied, both": (RAGGED | {"tied": False}, [{"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}]),
    "float16 base": ({"dtype": "float16"}, [{}]),
    "float32 base": ({"dtype": "float32"}, [{"r": 16}]),
    "bfloat16 adapter": ({}, [{"dtype": "bfloat16"}]),
    "float16 adapter": ({"dtype": "float16"}, [{"dtype": "float16", "target_modules": ["k_proj", "up_proj"]}]),
    "bfloat16 adapter of an embedding": (
        {"tied": False},
        [{"dtype": "bfloat16", "target_modules": ["embed_tokens", "lm_head", "o_proj"]}],
    ),
    "two adapters": ({}, [{}, {"seed": 2, "r": 3, "target_modules": ["q_proj", "up_proj"]}]),
    "three adapters": (
        {"tied": False},
        [
            {"target_modules": ["q_proj", "lm_head"]},
            {"seed": 2, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
            {"seed": 3, "target_modules": ["lm_head"], "dtype": "bfloat16"},
        ],
    ),
    "several shards": ({"max_shard_size": "60KB"}, [{}]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_pefts(make_base: Make, make_adapter: Make, tmp_path: Path, variant: str) -> None:
    options, configs = VARIANTS[variant]
    base = make_base(**options)
    adapters = [make_adapter(base, **config) for config in configs]
    theirs = merge_with_peft(base, adapters)
    values = {
        "base": str(base),
        "adapters": [str(adapter) for adapter in adapters],
        "verify": False,
        "outputs": [{"format": "safetensors", "quant": q, "out": tmp_path / q} for q in ("fp32", "bf16", "fp16")],
    }
    export(Recipe.build(values), Execution(device="cpu"))
    for quant, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        ours = model_tensors(tmp_path / quant)
        assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if options.get("tied", True) else set())
        stored = {str(tensor.dtype) for tensor in ours.values()}
        kept = f"torch.{options.get('dtype', 'bfloat16')}"
        if str(dtype) != kept:
            assert stored == {str(dtype)}
        assert_same_merge(ours, theirs, dtype)


def test_updates_are_large_enough_to_be_seen(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    # Guards the test above: it would pass without any merge if the updates were lost in rounding.
    base = make_base()
    ours, kept = merge_with_us(tmp_path / "out", base, make_adapter(base), quant="bf16"), model_tensors(base)
    for name, tensor in ours.items():
        changed = (tensor != kept[name]).float().mean()
        assert changed > 0.9 if "proj" in name else changed == 0, name


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_fan_in_fan_out_is_reset_as_peft_does(
    make_base: Make, make_adapter: Make, tmp_path: Path, targets: list[str]
) -> None:
    base = make_base(tied=False, **RAGGED)
    adapter = copy(make_adapter(base, target_modules=targets), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    ours = merge_with_us(tmp_path / "out", base, adapter)
    assert_same_merge(ours, merge_with_peft(base, [adapter]), torch.float32)


def test_first_of_two_patterns_wins_as_in_peft(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base()
    for patterns in ({"q_proj": 3, "layers.1.self_attn.q_proj": 9}, {"layers.1.self_attn.q_proj": 9, "q_proj": 3}):
        adapter = make_adapter(base, target_modules=["q_proj"], alpha_pattern=patterns)
        out = tmp_path / next(iter(patterns))
        assert_same_merge(merge_with_us(out, base, adapter), merge_with_peft(base, [adapter]), torch.float32)


# --- tied embeddings -------------------------------------------------------------------------------------------------

TIED: dict[str, list[dict[str, Any]]] = {
    "head": [{"target_modules": ["q_proj", "lm_head"]}],
    "embedding": [{"target_modules": ["q_proj", "embed_tokens"]}],
    "both": [{"target_modules": ["embed_tokens", "lm_head"]}],
    "head and embedding by two adapters": [
        {"target_modules": ["lm_head", "up_proj"]},
        {"seed": 2, "target_modules": ["embed_tokens"], "use_rslora": True},
    ],
}


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(0, 360, 7).view(2, -1)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.fixture(scope="module")
def tied_bases(make_base: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied base; and the same with the head stored again, as it is or (then transformers does not tie it) another."""
    folder, original = tmp_path_factory.mktemp("tied"), make_base("qwen3", tied=True)
    bases = {"no head": original}
    for kind, factor in (("the same head", 1), ("another head", 2)):
        bases[kind] = copy(original, folder / kind.replace(" ", "-"))

        def store(tensors: Tensors, factor: int = factor) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

        edit_tensors(bases[kind] / "model.safetensors", store)
    return bases


@pytest.mark.parametrize("stored", ["no head", "the same head", "another head"])
@pytest.mark.parametrize("variant", TIED)
def test_tied_model_behaves_as_trained(
    tied_bases: dict[str, Path], make_adapter: Make, tmp_path: Path, variant: str, stored: str
) -> None:
    from transformers import AutoModelForCausalLM

    base, out = tied_bases[stored], tmp_path / "out"
    adapters = [make_adapter(base, **config) for config in TIED[variant]]
    expected = logits_of(with_peft(base, adapters))
    result = export_to(out, base, *adapters, quant="fp32")
    assert result.plan.model.untied
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.tie_word_embeddings is False
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    torch.testing.assert_close(logits_of(loaded.eval()), expected, rtol=1e-4, atol=1e-4)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    assert (expected - plain).abs().max() > 0.05


def test_tied_model_stays_tied_without_such_an_update(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("qwen3", tied=True)
    result = export_to(tmp_path / "out", base, make_adapter(base))
    assert not result.plan.model.untied
    assert "lm_head.weight" not in model_tensors(tmp_path / "out")


# --- the same bytes however it runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(make_base: Make, make_adapter: Make) -> tuple[Path, Path]:
    base = make_base(tied=False, dtype="float32", **RAGGED)
    return base, make_adapter(base, r=5, target_modules=["q_proj", "down_proj", "gate_proj", "embed_tokens", "lm_head"])


@pytest.fixture(scope="module")
def undisturbed(ragged: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    _export_two(ragged, folder, Execution(device="cpu", threads=1, block_bytes=1 << 24))
    return hashes(folder)


def _export_two(inputs: tuple[Path, Path], folder: Path, execution: Execution) -> None:
    base, adapter = inputs
    outputs = [
        {"format": "safetensors", "out": folder / "st", "quant": "fp32"},
        {"format": "gguf", "out": folder / "gguf", "quant": ["Q4_K_M", "Q8_0"]},
    ]
    values = {"base": str(base), "adapters": [str(adapter)], "outputs": outputs, "name": "m", "verify": False}
    export(Recipe.build(values), execution)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block_bytes=st.integers(4096, 1 << 19), threads=st.integers(1, 5))
def test_same_bytes_for_any_block_size_and_thread_count(
    ragged: tuple[Path, Path],
    undisturbed: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    block_bytes: int,
    threads: int,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    _export_two(ragged, folder, Execution(device="cpu", threads=threads, block_bytes=block_bytes))
    assert hashes(folder) == undisturbed


# --- what only shows while the base is read --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_base_that_is_not_finite(
    make_base: Make, make_adapter: Make, tmp_path: Path, name: str, dtype: str, value: float
) -> None:
    original = make_base(dtype=dtype)
    base = copy(original, tmp_path / "base")

    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    edit_tensors(base / "model.safetensors", spoil)
    caught = refused(NonFiniteTensorError, tmp_path / "out", base, make_adapter(original))
    assert caught.thing == name


def test_merge_that_overflows_float32(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    original = make_base(dtype="float32")
    base, name = copy(original, tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    adapter = copy(make_adapter(original), tmp_path / "adapter")
    largest = torch.finfo(torch.float32).max
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: torch.full((128, 64), largest)}))
    edit_json(adapter / "adapter_config.json", lora_alpha=1e38)
    caught = refused(NonFiniteTensorError, tmp_path / "out", base, adapter)
    assert "after the merge" in caught.found


def test_overflow_of_float16_is_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    original = make_base()
    base, name = copy(original, tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"

    def enlarge(tensors: Tensors) -> None:
        tensors[name][5, 7] = -70_000.0

    edit_tensors(base / "model.safetensors", enlarge)
    caught = refused(OverflowRefusedError, tmp_path / "out", base, make_adapter(original), quant="fp16")
    assert caught.thing == name
    assert float(caught.found) > 65504
    export_to(tmp_path / "bf16", base, make_adapter(original), quant="bf16")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (4, 3, 2, 2), (0, 4), (4, 0)], ids=str)
def test_tensors_that_no_adapter_touches_are_kept(make_base: Make, tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = copy(make_base(), tmp_path / "base")
    torch.manual_seed(0)
    extra = torch.randn(shape).bfloat16()
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({"model.mtp.extra": extra}))
    export_to(tmp_path / "out", base)
    kept = model_tensors(tmp_path / "out")["model.mtp.extra"]
    assert kept.shape == extra.shape
    assert raw_bytes(kept) == raw_bytes(extra)


def test_base_alone_is_copied_bit_for_bit(make_base: Make, tmp_path: Path) -> None:
    base = make_base()
    export_to(tmp_path / "out", base)
    ours, theirs = model_tensors(tmp_path / "out"), model_tensors(base)
    assert {name: raw_bytes(tensor) for name, tensor in ours.items()} == {
        name: raw_bytes(tensor) for name, tensor in theirs.items()
    }
