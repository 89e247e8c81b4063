"""GGUF files as exported, read back by gguf's own reader and dequantizer, and scored by llama.cpp itself."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exporter import Execution, export
from exporter.backends.gguf.backend import GgufBackend
from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS, library, quantize_rows
from exporter.backends.gguf.file_types import BLOCK_SIZES, FILE_TYPES, has_importance, row_bytes
from exporter.backends.gguf.imatrix.file import Importance, imatrix_bytes
from exporter.backends.writing.offset_writer import encode_float
from exporter.errors import (
    BackendError,
    MissingTensorError,
    OverflowRefusedError,
    RecipeError,
    RefusalError,
    UnexpectedTensorError,
    UnknownQuantizationError,
    UnsupportedModelError,
)
from tests.exports import export_to, recipe
from tests.folders import copy, edit_json, edit_tensors, listing
from tests.merged import (
    dequantized,
    drop_tensor,
    export_gguf,
    gguf_names,
    load_peft,
    merged_model,
    peft_log_probabilities,
    plan_gguf,
    random_windows,
    tensor_bytes,
    tensor_types,
)

Floats = npt.NDArray[np.float32]

# Sizes at which every type applies: rows of 256 and 512.
WIDE = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 4}

# The types that need no importance matrix; test_imatrix_plan.py has plans with one.
PLAIN = tuple(name for name, file_type in FILE_TYPES.items() if not file_type.needs_imatrix)

# Largest error of a dequantized value, as a share of the largest magnitude in its block. Half a step of the type's
# grid, and for the K-quants, whose block scales are rounded themselves, one.
ERRORS = {
    "F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q6_K": 1 / 16, "Q5_K": 1 / 12, "Q5_0": 1 / 15,
    "Q5_1": 1 / 15, "Q4_K": 1 / 6, "Q4_0": 1 / 7, "Q4_1": 1 / 7, "IQ4_NL": 1 / 4, "IQ4_XS": 1 / 4, "Q3_K": 1 / 3,
    "Q2_K": 3 / 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def wide(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen2", tied=False, **WIDE)


@pytest.fixture(scope="session")
def wide_adapter(wide: Path, make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(wide)


@pytest.fixture(scope="session")
def float32_merge(wide: Path, wide_adapter: Path) -> dict[str, Floats]:
    """The merge in float32 by peft, under the names of GGUF."""
    merged = load_peft(wide, wide_adapter).merge_and_unload()
    names = gguf_names(merged_model(wide))
    return {names[name]: tensor.numpy() for name, tensor in merged.state_dict().items() if name in names}


@pytest.fixture(scope="session")
def all_types(wide: Path, wide_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with a file of every type, from one run."""
    out = tmp_path_factory.mktemp("all") / "out"
    export_to(out, wide, wide_adapter, format="gguf", quant=PLAIN, name="model")
    return out


def _close(ours: Floats, theirs: Floats) -> bool:
    """Equal up to the last bit or two of a float32 sum."""
    return bool(np.allclose(ours, theirs, rtol=3e-7, atol=1e-8))


def test_f32_is_the_merge(all_types: Path, float32_merge: dict[str, Floats]) -> None:
    found = dequantized(all_types / "model-F32.gguf")
    assert found.keys() == float32_merge.keys()
    for name, tensor in found.items():
        assert tensor.shape == float32_merge[name].shape
        assert _close(tensor, float32_merge[name]), name


def test_f32_of_a_base_alone_is_exactly_the_base(wide: Path, tmp_path: Path) -> None:
    found = dequantized(export_gguf(wide, tmp_path / "out"))
    names = gguf_names(merged_model(wide))
    for name, tensor in load_peft(wide).state_dict().items():
        assert np.array_equal(found[names[name]], tensor.numpy()), name


@pytest.mark.parametrize("quant", PLAIN)
def test_what_is_stored_is_within_the_type_s_error_of_the_merge(
    all_types: Path, float32_merge: dict[str, Floats], quant: str
) -> None:
    file = all_types / f"model-{quant}.gguf"
    types, found = tensor_types(file), dequantized(file)
    assert FILE_TYPES[quant].default in types.values()
    for name, tensor in found.items():
        block = BLOCK_SIZES[types[name]][0]
        expected = float32_merge[name].reshape(-1, block)
        allowed = ERRORS[types[name]] * np.abs(expected).max(axis=1, keepdims=True) + 1e-6
        errors = np.abs(tensor.reshape(-1, block) - expected)
        assert (errors <= allowed).all(), (name, types[name], float((errors / allowed).max() * ERRORS[types[name]]))


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS"])
def test_several_types_in_one_run_are_the_files_of_single_runs(
    wide: Path, wide_adapter: Path, all_types: Path, tmp_path: Path, quant: str
) -> None:
    single = export_gguf(wide, tmp_path / "out", quant, adapters=(wide_adapter,))
    assert single.read_bytes() == (all_types / single.name).read_bytes()


@pytest.mark.parametrize(("threads", "block_bytes"), [(1, 4096), (3, 70_000), (2, 1 << 24)])
def test_bytes_do_not_depend_on_threads_or_blocks(
    wide: Path, wide_adapter: Path, all_types: Path, tmp_path: Path, threads: int, block_bytes: int
) -> None:
    export_to(
        tmp_path / "out", wide, wide_adapter, format="gguf", quant="Q4_K_M", name="model",
        threads=threads, block_bytes=block_bytes,
    )  # fmt: skip
    name = "model-Q4_K_M.gguf"
    assert (tmp_path / "out" / name).read_bytes() == (all_types / name).read_bytes()


def test_a_file_is_as_large_as_planned_and_its_tensors_are_in_model_order(
    wide: Path, wide_adapter: Path, all_types: Path
) -> None:
    model = merged_model(wide, wide_adapter)
    for quant in PLAIN:
        plan, file = plan_gguf(model, quant), all_types / f"model-{quant}.gguf"
        assert file.stat().st_size == plan.files[0].nbytes
        assert plan.nbytes == plan.files[0].nbytes + sum(map(len, plan.documents.values()))
        tensors = gguf.GGUFReader(file).tensors
        assert [(t.name, t.tensor_type.name, t.data_offset) for t in tensors] == [
            (t.name, t.type, t.offset) for t in plan.tensors
        ]
    layers = [int(t.name.split(".")[1]) for t in plan.tensors if t.name.startswith("blk.")]
    assert layers == sorted(layers)
    assert [plan.tensors[0].name, plan.tensors[-1].name] == ["token_embd.weight", "output.weight"]


def test_padding_between_tensors_is_zero(make_base: Callable[..., Path], tmp_path: Path) -> None:
    # 100 columns: rows of 400 bytes in F32, and norms whose length is no multiple of 32 bytes.
    base = make_base("qwen2", hidden=100, intermediate=60, heads=5, kv_heads=1)
    raw = export_gguf(base, tmp_path / "out", "F16").read_bytes()
    plan = plan_gguf(merged_model(base), "F16")
    end = len(plan.files[0].header)
    gaps = 0
    for tensor in plan.tensors:
        gaps += len(raw[end : tensor.offset])
        assert not any(raw[end : tensor.offset])
        end = tensor.offset + tensor.nbytes
    assert not any(raw[end:])
    assert gaps > 0


# --- refusals ------------------------------------------------------------------------------------------------------


def _refused(error: type[RefusalError], base: Path, out: Path, quant: str = "Q8_0") -> RefusalError:
    before = listing(out.parent)
    with pytest.raises(error) as caught:
        export_to(out, base, format="gguf", quant=quant)
    assert listing(out.parent) == before
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_refused(make_base: Callable[..., Path], tmp_path: Path, name: str) -> None:
    base = copy(make_base("qwen3", tied=False), tmp_path / "base")
    drop_tensor(base / "model.safetensors", name)
    assert _refused(MissingTensorError, base, tmp_path / "out").thing == name


def test_a_tensor_of_another_shape_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = copy(make_base("qwen3"), tmp_path / "base")
    edit_json(base / "config.json", intermediate_size=256)
    error = _refused(MissingTensorError, base, tmp_path / "out")
    assert "[128, 64]" in error.found
    assert "[256, 64]" in error.expected


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.bias", "mtp.fc.weight", "model.layers.2.extra"])
def test_a_tensor_that_gguf_has_no_place_for_is_refused(
    make_base: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = copy(make_base("qwen3"), tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(64)}))
    assert _refused(UnexpectedTensorError, base, tmp_path / "out").thing == name


def test_buffers_that_a_runtime_recomputes_are_left_out(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = copy(make_base("qwen2"), tmp_path / "base")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(8)}))
    assert tensor_bytes(export_gguf(base, tmp_path / "out")) == tensor_bytes(
        export_gguf(make_base("qwen2"), tmp_path / "without")
    )


def test_a_head_that_a_tied_checkpoint_stores_again_is_left_out(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = copy(make_base("qwen2"), tmp_path / "base")
    edit_tensors(
        base / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    assert "output.weight" not in tensor_types(export_gguf(base, tmp_path / "out"))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]},
        {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]},
        {"model_type": None, "architectures": None},
    ],
    ids=str,
)
def test_another_architecture_is_refused(
    make_base: Callable[..., Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    base = copy(make_base("qwen2"), tmp_path / "base")
    edit_json(base / "config.json", **change)
    error = _refused(UnsupportedModelError, base, tmp_path / "out")
    assert "Qwen2ForCausalLM" in error.expected
    assert str(change["model_type"]) in error.found


def test_a_qwen3_with_attention_biases_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp has no place for the bias of o_proj in a Qwen3 and does not load a file that has it."""
    error = _refused(UnsupportedModelError, make_base("qwen3", attention_bias=True), tmp_path / "out")
    assert "attention_bias" in error.thing or "bias" in error.thing


def test_an_unknown_type_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    error = _refused(UnknownQuantizationError, make_base("qwen2"), tmp_path / "out", "Q4_K_XL")
    for name in FILE_TYPES:
        assert name in error.expected


def test_a_type_may_be_given_in_small_letters(make_base: Callable[..., Path]) -> None:
    assert plan_gguf(merged_model(make_base("qwen2")), "q4_k_m").quant == "Q4_K_M"


def test_options_are_refused(make_base: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="max_shard_size"):
        GgufBackend().plan(merged_model(make_base("qwen2")), "F32", {"max_shard_size": "1GB"})


def test_an_export_with_an_importance_matrix(wide: Path, wide_adapter: Path, all_types: Path, tmp_path: Path) -> None:
    """Through the public API: the files, the matrix beside them, and bytes that do not depend on threads or blocks."""
    rng = np.random.default_rng(0)
    matrices = [t for t in plan_gguf(merged_model(wide)).tensors if has_importance(t.name)]
    entries = {
        tensor.name: Importance(rng.exponential(size=(1, tensor.columns)).astype(np.float32), np.ones(1, np.float32))
        for tensor in matrices
    }
    given = tmp_path / "given.gguf"
    given.write_bytes(imatrix_bytes(entries, ("wiki.txt",), 1, 512))
    found = []
    for threads, block_bytes in ((1, 70_000), (3, 1 << 24)):
        out = tmp_path / str(threads)
        export_to(
            out, wide, wide_adapter, format="gguf", quant=("Q4_K_M", "IQ3_S"), name="model", threads=threads,
            block_bytes=block_bytes, options={"imatrix": str(given)},
        )  # fmt: skip
        names = ("model-Q4_K_M.gguf", "model-IQ3_S.gguf", "model.imatrix.gguf")
        assert set(names) <= {path.name for path in out.iterdir()}
        found.append([(out / name).read_bytes() for name in names])
    assert found[0] == found[1]
    assert found[0][2] == given.read_bytes()
    without, with_one = tensor_bytes(all_types / names[0]), tensor_bytes(out / names[0])
    assert {name for name in without if without[name] != with_one[name]} == entries.keys()


def test_default_type(make_base: Callable[..., Path]) -> None:
    assert GgufBackend().default_quant(merged_model(make_base("qwen2"))) == "Q4_K_M"


def _with_value(base: Path, target: Path, value: float) -> Path:
    """A float32 copy of a base with one value of one matrix changed."""
    copy(base, target)
    edit_json(target / "config.json", dtype="float32")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].float()
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    edit_tensors(target / "model.safetensors", change)
    return target


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.9, True), (65520.0, False), (-1e6, False)])
def test_f16_overflow_is_refused(make_base: Callable[..., Path], tmp_path: Path, value: float, fits: bool) -> None:
    base = _with_value(make_base("qwen3"), tmp_path / "base", value)
    if fits:
        found = dequantized(export_gguf(base, tmp_path / "out", "F16"))
        assert found["blk.1.ffn_up.weight"][3, 5] == 65504.0
    else:
        error = _refused(OverflowRefusedError, base, tmp_path / "out", "F16")
        assert "ffn_up" in error.thing or "up_proj" in error.thing
        assert export_gguf(base, tmp_path / "bf16", "BF16").is_file()


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_a_value_whose_block_scale_overflows_fails_by_name(
    make_base: Callable[..., Path], tmp_path: Path, quant: str
) -> None:
    base = _with_value(make_base("qwen2", **WIDE), tmp_path / "base", 3e38)
    with pytest.raises(BackendError, match="not finite"):
        export_gguf(base, tmp_path / "out", quant)
    assert not (tmp_path / "out").exists()


# --- fallbacks -----------------------------------------------------------------------------------------------------


def test_fallbacks_are_in_plan_file_and_manifest(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3", hidden=96, intermediate=320, heads=6)
    plan = plan_gguf(merged_model(base), "Q4_K_M")
    fallen = {tensor.name: (tensor.fallback_from, tensor.type) for tensor in plan.fallbacks}
    assert fallen["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert fallen["blk.1.ffn_down.weight"] == ("Q6_K", "Q8_0")
    assert not [name for name in fallen if "norm" in name]
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith(f"{len(fallen)} tensors (")
    assert "Q4_K → Q5_0" in plan.notes[0]

    result = export_to(tmp_path / "out", base, format="gguf", quant="Q4_K_M", name="model").folders[0]
    artifact = result.manifest["artifacts"][0]
    assert artifact["notes"] == list(plan.notes)
    types = tensor_types(result.path / "model-Q4_K_M.gguf")
    assert {tensor["name"]: tensor["type"] for tensor in artifact["tensors"]} == types
    wanted = {t["name"]: (t["wanted"], t["type"]) for t in artifact["tensors"] if "wanted" in t}
    assert wanted == fallen


def test_no_fallbacks_no_notes(wide: Path) -> None:
    plan = plan_gguf(merged_model(wide), "Q4_K_M")
    assert plan.fallbacks == ()
    assert plan.notes == ()


# --- head and embedding apart --------------------------------------------------------------------------------------


def _assert_scores(file: Path, base: Path, *adapters: Path, tolerance: float = 1e-3) -> None:
    """llama.cpp's log-probabilities of a file are those of the unmerged model."""
    from exporter.runtimes.llamacpp.runtime import LlamaCpp

    windows = random_windows(2, 64, 384)
    scores = LlamaCpp().score(file, windows, lambda _: None)
    expected = peft_log_probabilities(load_peft(base, *adapters), windows)[:, windows.first_scored :]
    assert np.abs(scores.log_probabilities - expected).max() < tolerance


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_tied_model_whose_head_or_embedding_is_trained_is_untied(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    base = make_base(family)
    adapter = make_adapter(base, target_modules=["q_proj", target], scale=0.1)
    file = export_gguf(base, tmp_path / "out", adapters=(adapter,))
    tensors = dequantized(file)
    changed, kept = ("output.weight", "token_embd.weight")[:: 1 if target == "lm_head" else -1]
    original = load_peft(base).state_dict()["model.embed_tokens.weight"].numpy()
    assert np.array_equal(tensors[kept], original)
    assert not np.allclose(tensors[changed], original, atol=1e-3)
    _assert_scores(file, base, adapter)
    plan = plan_gguf(merged_model(base, adapter), "Q4_K_M")
    assert any("untied" in note for note in plan.notes)


def test_an_untied_head_gets_the_head_s_type_and_the_embedding_the_default(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    base = make_base("qwen3", **WIDE)
    adapter = make_adapter(base, target_modules=["lm_head"])
    tied = {t.name: t.type for t in plan_gguf(merged_model(base), "Q4_K_M").tensors}
    untied = {t.name: t.type for t in plan_gguf(merged_model(base, adapter), "Q4_K_M").tensors}
    assert tied["token_embd.weight"] == "Q6_K"
    assert untied["token_embd.weight"] == "Q4_K"
    assert untied["output.weight"] == "Q6_K"


# --- bytes of floats and blocks ------------------------------------------------------------------------------------


def _by_ggml(values: Floats, kind: str) -> bytes:
    """What ggml itself makes of rows."""
    target = ctypes.create_string_buffer(values.shape[0] * row_bytes(kind, values.shape[1]))
    address = values.ctypes.data_as(ctypes.c_void_p)
    written = library().ggml_quantize_chunk(TYPE_NUMBERS[kind], address, target, 0, *values.shape, None)
    assert written == len(target)
    return target.raw


FINITE_F16 = arrays(np.float32, (3, 32), elements=st.floats(-65504, 65504, width=32))
FINITE_BF16 = arrays(np.float32, (3, 32), elements=st.floats(-(2.0**127), 2.0**127, width=32))


@settings(max_examples=100, deadline=None)
@given(values=FINITE_F16)
def test_f16_is_rounded_as_ggml_rounds(values: Floats) -> None:
    assert bytes(encode_float(torch.from_numpy(values), "F16", "t")) == _by_ggml(values, "F16")


@settings(max_examples=100, deadline=None)
@given(values=FINITE_BF16)
def test_bf16_is_rounded_as_ggml_rounds(values: Floats) -> None:
    assert bytes(encode_float(torch.from_numpy(values), "BF16", "t")) == _by_ggml(values, "BF16")


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_ties_subnormals_and_large_values_are_rounded_as_ggml_rounds(kind: str) -> None:
    # Every pattern of the upper 16 bits, with the lower bits below, at and above the tie; all finite ones.
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (upper[:, None] | lower[None, :]).ravel().view(np.float32)
    limit = 65520.0 if kind == "F16" else 3.38e38
    values = values[np.abs(values) < limit]
    values = np.ascontiguousarray(values[: len(values) // 32 * 32].reshape(-1, 32))
    assert bytes(encode_float(torch.from_numpy(values), kind, "t")) == _by_ggml(values, kind)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"])
def test_zero_and_tiny_rows_are_quantized_to_finite_values(kind: str) -> None:
    values = np.zeros((3, 256), dtype=np.float32)
    values[1] = 1e-40
    values[2, 0] = -1.0
    stored = quantize_rows(kind, values.ctypes.data, 3, 256, 3 * row_bytes(kind, 256))
    found = gguf.quants.dequantize(np.frombuffer(stored, np.uint8).reshape(3, -1), gguf.GGMLQuantizationType[kind])
    assert np.isfinite(found).all()
    assert (found[0] == 0).all()
    assert found[2, 0] == pytest.approx(-1.0, abs=ERRORS[kind])


def test_several_types_and_folders_cost_one_read_of_the_base(
    wide: Path, wide_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = export_gguf(wide, tmp_path / "single", "Q8_0", adapters=(wide_adapter,))
    base, read, original = (wide / "model.safetensors").stat().st_size, Counter[int](), os.preadv

    def counting(descriptor: int, *arguments: Any) -> int:
        count: int = original(descriptor, *arguments)
        # The same pages are hashed by a thread of its own.
        if not threading.current_thread().name.startswith("hash"):
            read[os.fstat(descriptor).st_ino] += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    gguf_only = recipe(
        wide, (wide_adapter,), tmp_path / "gguf", format="gguf", quant=("Q8_0", "Q4_K_M", "BF16"), name="model"
    )
    other = recipe(wide, (wide_adapter,), tmp_path / "hf", name="model").outputs[0]
    both = gguf_only.model_copy(update={"outputs": (*gguf_only.outputs, other)})
    result = export(both, Execution(device="cpu"))
    assert [folder.path.name for folder in result.folders] == ["gguf", "hf"]
    assert 0.95 * base < read[(wide / "model.safetensors").stat().st_ino] <= base
    assert single.read_bytes() == (tmp_path / "gguf" / single.name).read_bytes()
