"""What is in the stored weights: the arithmetic, the readers against other people's, and every fault by its name."""

from __future__ import annotations

import ctypes
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends.base import Backend, Writer
from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS, library, quantize_rows
from exporter.backends.gguf.file_types import BLOCK_SIZES
from exporter.backends.gguf.header_reader import read_header
from exporter.backends.gguf.imatrix.file import Importance, imatrix_bytes
from exporter.backends.gguf.weight_reader import GAUSSIAN_ERRORS, tolerance
from exporter.backends.output_plan import OutputPlan
from exporter.backends.registry import load_backend
from exporter.backends.weight_reader import StoredWeight, Tolerance
from exporter.merge.model import MergedModel
from exporter.verify.weights.as_json import tensor_figures, weights_json
from exporter.verify.weights.check import WeightsResult, check_weights, read_weights
from exporter.verify.weights.limits import survival_check
from exporter.verify.weights.sums import Sums, block_sums
from tests.exports import export_to
from tests.folders import copy, edit_json, edit_tensors
from tests.gptq import make_gptq, unpack_script
from tests.merged import dequantized, drop_tensor, export_gguf, gguf_names, merged_model

Floats = npt.NDArray[np.float32]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
LOOSE = Tolerance(9.0, 9.0, 9.0, 0.0)


def weight_of(shape: tuple[int, ...], group: int = 16, block: int = 32) -> StoredWeight:
    return StoredWeight("stored", "merged", "Q", shape, group, block, LOOSE)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 3),
    group=st.sampled_from([1, 16]),
    noise=st.floats(0, 1),
    share=st.floats(-1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_are_those_of_whole_arrays(
    rows: int, blocks: int, group: int, noise: float, share: float, seed: int
) -> None:
    """Row by row as at once, against numpy in float64; `share` of the delta is stored, but for noise."""
    generator = np.random.default_rng(seed)
    base, delta, error = (generator.standard_normal((rows, 32 * blocks)).astype(np.float32) for _ in range(3))
    merged = base + delta
    stored = base + np.float32(share) * delta + np.float32(noise) * error
    weight = weight_of(merged.shape, group, 32 if group > 1 else 1)
    parts = [
        block_sums(stored[row : row + 1], merged[row : row + 1], base[row : row + 1], weight, row)
        for row in range(rows)
    ]
    sums = Sums()
    for part in parts:
        sums = sums.plus(part)
    sums = sums.whole()
    wide, target, change = (array.astype(np.float64) for array in (stored, merged, merged - base))
    start = target - change
    expected = np.linalg.norm(wide - target) / np.linalg.norm(target)
    assert sums.relative_error == pytest.approx(expected, rel=1e-5)
    assert sums.survival is not None
    assert sums.delta_error is not None
    assert sums.survival_stderr is not None
    assert sums.survival == pytest.approx(np.vdot(wide - start, change) / np.vdot(change, change), rel=1e-4, abs=1e-4)
    assert sums.delta_error == pytest.approx(np.linalg.norm(wide - start - change) / np.linalg.norm(change), rel=1e-4)
    assert sums.survival_stderr == pytest.approx(sums.delta_error / math.sqrt(wide.size), rel=1e-4)
    assert sums.elements == wide.size


def test_the_standard_error_of_survival_is_the_spread_of_survival() -> None:
    generator = np.random.default_rng(0)
    base, delta = (generator.standard_normal((8, 64)).astype(np.float32) for _ in range(2))
    delta *= 0.1
    found = []
    for _ in range(400):
        noise = 0.05 * generator.standard_normal(base.shape).astype(np.float32)
        found.append(block_sums(base + delta + noise, base + delta, base, weight_of((8, 64))).whole())
    survivals = np.array([sums.survival for sums in found])
    assert survivals.std() == pytest.approx(np.mean([sums.survival_stderr for sums in found]), rel=0.1)
    assert survivals.mean() == pytest.approx(1, abs=0.01)


def test_the_worst_group_is_found_with_its_place() -> None:
    merged = np.ones((5, 64), dtype=np.float32)
    stored = merged.copy()
    stored[3, 32:48] *= 1.5
    sums = block_sums(stored, merged, None, weight_of(merged.shape), first=10)
    assert (sums.group.row, sums.group.column) == (sums.gain.row, sums.gain.column) == (13, 32)
    assert sums.group.value == pytest.approx(0.5 / math.sqrt(1 + 1 / 16))
    assert sums.gain.value == pytest.approx(0.5 / (1 + 1 / 16))
    assert sums.survival is None


def test_a_row_that_is_shifted_is_found() -> None:
    merged = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    stored = merged.copy()
    stored[2] += 0.25
    sums = block_sums(stored, merged, None, weight_of(merged.shape), first=10)
    assert sums.shift.row == 12
    assert sums.shift.value == pytest.approx(0.25 * 8 / np.linalg.norm(merged[2]), rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_flagged_and_is_null_in_json(value: float) -> None:
    merged = np.ones((2, 32), dtype=np.float32)
    stored = merged.copy()
    stored[1, 3] = value
    weight = StoredWeight("a", "a", "Q8_0", (2, 32), 32, 32, tolerance("Q8_0", 32, imatrix=False))
    with np.errstate(invalid="ignore"):
        result = WeightsResult(((weight, block_sums(stored, merged, None, weight).whole()),), ())
    assert result.broken
    assert "a is" in result.broken[0]
    summary = weights_json(result)
    assert summary is not None
    json.dumps(summary, allow_nan=False)
    assert summary["relative_error"] is None


# --- readers ---------------------------------------------------------------------------------------------------------


class Traits(ctypes.Structure):
    """ggml_type_traits (ggml/include/ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )  # fmt: skip


def to_float(kind: str, raw: npt.NDArray[np.uint8], elements: int) -> Floats:
    """ggml's own dequantizer."""
    ggml = library()
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    address = ggml.ggml_get_type_traits(TYPE_NUMBERS[kind]).contents.to_float
    found = np.empty(elements, dtype=np.float32)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)
    function(raw.ctypes.data, found.ctypes.data, elements)
    return found


# The tables of their grids take seconds to make.
SLOW = ("IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in sorted(GAUSSIAN_ERRORS)]
)
def test_gguf_types_are_dequantized_as_ggml_does_and_leave_their_error(kind: str) -> None:
    """The offsets are those of gguf's own reader; the error of Gaussian weights is the one of the table."""
    weights = np.random.default_rng(0).standard_normal((32, 1024)).astype(np.float32)
    elements, nbytes = BLOCK_SIZES[kind]
    raw = quantize_rows(
        kind, weights.ctypes.data, 32, 1024, weights.size // elements * nbytes, np.ones(1024, np.float32)
    )
    rows = np.frombuffer(raw, np.uint8).reshape(32, -1)
    found = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.reshape(-1), to_float(kind, rows, weights.size))
    error = np.linalg.norm(found - weights) / np.linalg.norm(weights)
    assert 0.75 * GAUSSIAN_ERRORS[kind] < error < 1.05 * GAUSSIAN_ERRORS[kind]


TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q5_1", "Q4_K_M", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS",
         "Q3_K_M", "Q2_K")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    base = make_base("qwen3", hidden=256, intermediate=512, heads=4, kv_heads=4, head_dim=64, tied=False)
    return base, make_adapter(base)


@pytest.fixture(scope="module")
def model(inputs: tuple[Path, Path]) -> MergedModel:
    return merged_model(*inputs)


@pytest.fixture(scope="module")
def files(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A maker of sound GGUF files by type, cached; to be copied before one is changed."""
    parent = tmp_path_factory.mktemp("weights")

    def make(quant: str) -> Path:
        file = parent / quant / f"model-{quant}.gguf"
        return file if file.is_file() else export_gguf(inputs[0], parent / quant, quant, adapters=(inputs[1],))

    return make


def check(model: MergedModel, entry: Path, format_: str = "gguf", quant: str = "Q4_K_M") -> WeightsResult:
    result = read_weights(load_backend(format_), model, quant, entry, threads=2, checksums={})
    assert result is not None
    return result


@pytest.mark.parametrize("quant", TYPES)
def test_a_sound_gguf_file_is_not_flagged_and_reads_as_gguf_reads_it(
    model: MergedModel, files: Callable[[str], Path], quant: str
) -> None:
    result = check(model, files(quant), quant=quant)
    assert result.broken == ()
    assert len(result.tensors) == len(model.tensors)
    assert result.updated.survival == pytest.approx(1, abs=0.1)
    expected, names = dequantized(files(quant)), gguf_names(model)
    merged = dequantized(files("F32"))
    for weight, sums in result.tensors:
        name = names[weight.source]
        assert weight.name == name
        error = np.linalg.norm(expected[name] - merged[name]) / np.linalg.norm(merged[name])
        assert sums.relative_error == pytest.approx(error, rel=1e-4, abs=1e-7), name


def test_the_header_is_read_as_gguf_reads_it(files: Callable[[str], Path]) -> None:
    header = read_header(files("Q4_K_M"))
    assert header.file_type == 15
    assert not header.imatrix
    reader = gguf.GGUFReader(files("Q4_K_M"))
    assert {(t.name, t.start, t.type, t.end - t.start) for t in header.tensors.values()} == {
        (t.name, t.data_offset, t.tensor_type.name, t.n_bytes) for t in reader.tensors
    }


@pytest.mark.parametrize("quant", ["fp32", "bf16", "fp16"])
def test_a_sound_folder_is_not_flagged(
    model: MergedModel, inputs: tuple[Path, Path], tmp_path: Path, quant: str
) -> None:
    export_to(tmp_path / "out", *inputs, quant=(quant,), options={"max_shard_size": "500KB"})
    result = check(model, tmp_path / "out", "safetensors", quant)
    assert result.broken == ()
    assert len(result.tensors) == len(model.tensors)
    assert (result.total.relative_error == 0) == (quant == "fp32")


def test_a_scalar_is_read_back(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = copy(make_base("qwen2"), tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({"model.scale": torch.tensor(0.1)}))
    export_to(tmp_path / "out", base, quant=("fp16",))
    result = check(merged_model(base), tmp_path / "out", "safetensors", "fp16")
    assert result.broken == ()
    ((_, sums),) = [pair for pair in result.tensors if pair[0].source == "model.scale"]
    assert 0 < sums.relative_error < 0.0005


def test_figures_do_not_depend_on_threads(model: MergedModel, files: Callable[[str], Path]) -> None:
    reader = load_backend("gguf").read(model, "Q4_K_M", files("Q4_K_M"))
    assert reader is not None
    found = [json.dumps(weights_json(check_weights(model, reader, threads))) for threads in (1, 3)]
    reader.close()
    assert found[0] == found[1]


def test_what_is_scored_afterwards_has_as_many_threads_as_before(
    model: MergedModel, files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    check(model, files("Q4_K_M"))
    assert asked == [1, 3]


def test_the_summary_has_layers_and_kinds(model: MergedModel, files: Callable[[str], Path]) -> None:
    result = check(model, files("Q4_K_M"))
    summary = weights_json(result)
    assert summary is not None
    assert summary["layers"].keys() == {"0", "1"}
    assert {"q_proj", "down_proj", "norm"} <= summary["kinds"].keys()
    assert summary["kinds"]["q_norm"]["survival"] is None
    assert summary["judged"] == model.updated
    # All that changed is judged, so the whole has the limit; of values rounded one by one, nothing is.
    assert abs(summary["survival"] - 1) < summary["survival_limit"] == result.judged.survival_limit
    alone = weights_json(check(model, files("F16")))
    assert alone is not None
    assert (alone["judged"], alone["survival_limit"]) == (0, None)
    assert [one["relative_error"] / one["limit"] < 1 for one in summary["worst"]] == [True] * 5
    nearest = summary["nearest"]
    assert list(nearest) == ["relative_error", "group", "scale", "row_mean", "survival"]
    assert all(0 < one["value"] < one["limit"] for one in nearest.values())
    assert list(alone["nearest"]) == ["relative_error", "group"]
    figures = tensor_figures(result)
    assert figures["blk.1.attn_q.weight"] == figures[Q_PROJ]
    assert figures["output_norm.weight"].keys() == {"relative_error"}
    assert weights_json(None) is None


@pytest.mark.parametrize(("group", "place"), [(32, "columns 32 to 63 of row 905"), (1, "column 40 of row 905")])
@pytest.mark.parametrize("value", [9.0, math.nan])
def test_a_reason_says_where_a_weight_is_off_the_most(group: int, place: str, value: float) -> None:
    """Also in rows that were looked at later than others."""
    merged = np.ones((1000, 64), dtype=np.float32)
    stored = merged.copy()
    stored[100:] *= 1.5
    stored[905, 40] = value
    weight = StoredWeight("a", "a", "Q", merged.shape, group, group, Tolerance(0.01, 0.01, 0.01, 0.0))
    with np.errstate(invalid="ignore"):
        parts = [block_sums(stored[at : at + 500], merged[at : at + 500], None, weight, at) for at in (0, 500)]
    sums = parts[0].plus(parts[1]).whole()
    (reason,) = WeightsResult(((weight, sums),), ()).broken
    assert f" off, {place} the most; Q leaves at most 1.00%" in reason
    loose = replace(weight, tolerance=replace(weight.tolerance, error=math.inf))
    (reason,) = WeightsResult(((loose, replace(sums, error=0.0)),), ()).broken
    assert reason.startswith(f"a: {place} {'are' if group > 1 else 'is'} ")


def test_the_error_of_the_delta_is_of_the_weights_that_have_one() -> None:
    """By layer and by kind, against numpy; a norm that the adapter leaves alone adds nothing."""
    generator = np.random.default_rng(0)
    names = [f"model.layers.{layer}.mlp.{kind}.weight" for layer in range(2) for kind in ("up_proj", "norm")]
    arrays = {name: generator.standard_normal((3, 4, 64)).astype(np.float32) for name in names}
    tensors = []
    for name, (merged, delta, error) in arrays.items():
        weight = StoredWeight(name, name, "Q", (4, 64), 16, 32, LOOSE)
        base = None if "norm" in name else merged - delta
        tensors.append((weight, block_sums(merged + error, merged, base, weight).whole()))
    summary = weights_json(WeightsResult(tuple(tensors), ()))
    assert summary is not None

    def expected(*layers: int) -> float:
        ours = np.stack([arrays[names[2 * layer]] for layer in layers], axis=1).astype(np.float64)
        return float(np.linalg.norm(ours[2]) / np.linalg.norm(ours[1]))

    assert summary["layers"]["0"]["delta_error"] == pytest.approx(expected(0), rel=1e-4)
    assert summary["layers"]["1"]["delta_error"] == pytest.approx(expected(1), rel=1e-4)
    whole = pytest.approx(expected(0, 1), rel=1e-4)
    assert summary["kinds"]["up_proj"]["delta_error"] == summary["delta_error"] == whole
    assert summary["kinds"]["norm"]["delta_error"] is None


def test_the_weight_that_is_nearest_to_a_limit_is_shown_with_its_place() -> None:
    limits = Tolerance(0.5, 1.0, 1.0, 0.0)
    loose, tight = (
        StoredWeight(name, name, "Q", (4, 64), 16, 32, replace(limits, group=group))
        for name, group in (("loose", 1.0), ("tight", 0.5))
    )
    merged = np.ones((4, 64), dtype=np.float32)
    stored = merged.copy()
    stored[2, 32:48] = 1.4
    tensors = [(weight, block_sums(stored, merged, None, weight).whole()) for weight in (loose, tight, loose)]
    summary = weights_json(WeightsResult(tuple(tensors), ()))
    assert summary is not None
    group = summary["nearest"]["group"]
    assert (group["name"], group["row"], group["column"], group["limit"]) == ("tight", 2, 32, 0.5)
    assert group["value"] == pytest.approx(0.4, rel=0.05)
    assert summary["nearest"]["relative_error"]["row"] is None
    stored[3, 5] = np.nan
    lost = WeightsResult(((tight, block_sums(stored, merged, None, tight).whole()),), ())
    assert lost.broken
    broken = weights_json(lost)
    assert broken is not None
    assert broken["nearest"]["group"]["value"] is None


# --- a wrong delta ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_", "quant"), [("gguf", "Q8_0"), ("gguf", "Q4_K_M"), ("safetensors", "bf16")])
@pytest.mark.parametrize(("wrong", "survival"), [("left out", 0.0), ("twice", 2.0), ("scale", 2.0), ("another", 0.0)])
def test_a_wrong_delta_is_flagged(
    model: MergedModel,
    inputs: tuple[Path, Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    format_: str,
    quant: str,
    wrong: str,
    survival: float,
) -> None:
    base, adapter = inputs
    rooted = copy(adapter, tmp_path / "rooted")
    # alpha / sqrt(r) in the place of alpha / r, with r = 4.
    edit_json(rooted / "adapter_config.json", use_rslora=True)
    adapters = {
        "left out": (), "twice": (adapter, copy(adapter, tmp_path / "again")), "scale": (rooted,),
        "another": (make_adapter(base, seed=7),),
    }[wrong]  # fmt: skip
    export_to(tmp_path / "out", base, *adapters, format=format_, quant=(quant,), name="model")
    entry = tmp_path / "out" if format_ == "safetensors" else tmp_path / "out" / f"model-{quant}.gguf"
    result = check(model, entry, format_, quant)
    assert any("_proj.weight" in reason for reason in result.broken)
    assert f"so are {model.updated - 5} more tensors" in result.broken
    assert result.updated.survival == pytest.approx(survival, abs=0.05)
    if format_ == "gguf":
        assert "of the adapter's whole change" in result.broken[-1]


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_small_delta_is_judged_by_all_tensors_together(
    inputs: tuple[Path, Path], tmp_path: Path, quant: str, missing: bool
) -> None:
    """A two-hundredth of the weights, far below what 4 bits leave."""
    base, small = inputs[0], copy(inputs[1], tmp_path / "small")
    edit_tensors(
        small / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: 0.05 * t for name, t in tensors.items() if "lora_B" in name}),
    )
    file = export_gguf(base, tmp_path / "out", quant, adapters=() if missing else (small,))
    result = check(merged_model(base, small), file, quant=quant)
    assert any("whole change" in reason for reason in result.broken) == missing
    assert bool(result.broken) == missing


@pytest.mark.parametrize(("group", "judged"), [(128, True), (32, False)])
def test_on_a_base_that_was_dequantized_a_delta_that_is_left_out_is_flagged(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, group: int, judged: bool
) -> None:
    """Where groups span several of the base's own."""
    base = copy(make_base("qwen3", hidden=256, intermediate=384, heads=4, kv_heads=2, head_dim=64), tmp_path / "base")

    def on_a_grid(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and name.endswith("_proj.weight"):
                blocks = tensor.float().reshape(-1, 32)
                step = (blocks.abs().amax(1, keepdim=True) / 8).bfloat16().float()
                tensors[name] = ((blocks / step).round() * step).reshape(tensor.shape).to(tensor.dtype)

    edit_tensors(base / "model.safetensors", on_a_grid)
    adapter = make_adapter(base, scale=0.02)
    model, quant = merged_model(base, adapter), f"gptq-int4-g{group}"
    values: dict[str, Any] = {"format": "gptq", "quant": (quant,), "calibration": {"tokens": 1024, "window": 64}}
    export_to(tmp_path / "sound", base, adapter, **values)
    export_to(tmp_path / "without", base, **values)
    sound, without = (check(model, tmp_path / name, "gptq", quant) for name in ("sound", "without"))
    assert not any(sums.varied for _, sums in sound.tensors if sums.delta)
    assert sound.broken == ()
    assert without.updated.survival == pytest.approx(0, abs=0.1)
    assert any("of the adapter's whole change" in reason for reason in without.broken) == judged


# --- damaged files ---------------------------------------------------------------------------------------------------


def edited(file: Path, tmp_path: Path, changes: dict[str, Callable[[npt.NDArray[np.uint8]], None]]) -> Path:
    """A copy of a GGUF file in which the bytes of some tensors (rows, row bytes) are changed."""
    target = tmp_path / file.name
    shutil.copyfile(file, target)
    with target.open("r+b") as stream:
        for name, change in changes.items():
            tensor = read_header(file).tensors[name]
            stream.seek(tensor.start)
            raw = np.frombuffer(bytearray(stream.read(tensor.end - tensor.start)), np.uint8).reshape(
                -1, tensor.row_bytes
            )
            change(raw)
            stream.seek(tensor.start)
            stream.write(raw.tobytes())
    return target


def only(result: WeightsResult, *names: str) -> None:
    """Exactly these tensors are named as wrong."""
    assert len(result.broken) == len(names), result.broken
    for name, reason in zip(names, result.broken, strict=True):
        assert name in reason


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_a_tensor_of_zeros_or_a_block_of_noise_is_flagged(
    model: MergedModel, files: Callable[[str], Path], tmp_path: Path, quant: str
) -> None:
    zeros = edited(files(quant), tmp_path, {"blk.1.attn_q.weight": lambda raw: raw.fill(0)})
    only(check(model, zeros, quant=quant), Q_PROJ)

    def exchange(raw: npt.NDArray[np.uint8]) -> None:
        # Rows of somewhere else are noise of the same size.
        raw[8:12] = raw[100:104].copy()

    noise = edited(files(quant), tmp_path, {"blk.1.attn_q.weight": exchange})
    result = check(model, noise, quant=quant)
    only(result, Q_PROJ)
    assert any(f"row {row}" in result.broken[0] for row in range(8, 12)) or "row" not in result.broken[0]


def test_q_and_k_of_a_layer_exchanged_are_flagged(
    model: MergedModel, files: Callable[[str], Path], tmp_path: Path
) -> None:
    file, tensors = files("Q4_K_M"), read_header(files("Q4_K_M")).tensors
    content = file.read_bytes()
    kept = {
        name: content[tensors[f"blk.1.{name}.weight"].start : tensors[f"blk.1.{name}.weight"].end]
        for name in ("attn_q", "attn_k")
    }

    def put(name: str) -> Callable[[npt.NDArray[np.uint8]], None]:
        return lambda raw: raw.__setitem__(slice(None), np.frombuffer(kept[name], np.uint8).reshape(raw.shape))

    file = edited(
        files("Q4_K_M"), tmp_path, {"blk.1.attn_q.weight": put("attn_k"), "blk.1.attn_k.weight": put("attn_q")}
    )
    only(check(model, file), Q_PROJ.replace("q_proj", "k_proj"), Q_PROJ)


def test_a_file_without_a_norm_is_flagged(
    model: MergedModel, files: Callable[[str], Path], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(files("Q4_K_M").read_bytes().replace(b"output_norm.weight", b"output_nose.weight"))
    only(check(model, file), "output_norm.weight is missing", "output_nose.weight is not a tensor")
    export_to(tmp_path / "out", *inputs, quant=("bf16",))
    drop_tensor(tmp_path / "out" / "model.safetensors", "model.norm.weight")
    only(check(model, tmp_path / "out", "safetensors", "bf16"), "model.norm.weight is missing")


def test_a_tensor_that_is_cut_off_is_flagged(
    model: MergedModel, files: Callable[[str], Path], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    file = edited(files("Q4_K_M"), tmp_path, {})
    last = max(read_header(file).tensors.values(), key=lambda tensor: tensor.end)
    with file.open("r+b") as stream:
        stream.truncate(last.end - 32)
    only(check(model, file), f"{last.name} is cut off: 32 bytes")
    export_to(tmp_path / "out", *inputs, quant=("bf16",))
    shard = tmp_path / "out" / "model.safetensors"
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 32)
    assert (
        "is cut off: 32 bytes are missing in model.safetensors"
        in check(model, tmp_path / "out", "safetensors", "bf16").broken[0]
    )


def test_a_file_of_another_type_than_its_name_is_flagged(model: MergedModel, files: Callable[[str], Path]) -> None:
    broken = check(model, files("Q2_K"), quant="Q4_K_M").broken
    assert "says file type 10, Q4_K_M is 15" in broken[0]
    assert any("blk.1.attn_q.weight is Q2_K" in reason and "should be Q4_K" in reason for reason in broken)


def test_what_is_no_gguf_file_is_flagged(model: MergedModel, files: Callable[[str], Path], tmp_path: Path) -> None:
    for content in (b"", b"GGUF", files("Q4_K_M").read_bytes()[:1000], b"\x00" * 64):
        (tmp_path / "x.gguf").write_bytes(content)
        result = check(model, tmp_path / "x.gguf")
        assert result.tensors == ()
        assert "x.gguf" in result.broken[0]


def seen_bits(model: MergedModel, file: Path, quant: str, tmp_path: Path, byte: int) -> list[int]:
    """Which bits of the float16 at a byte of a row are seen when they are flipped, lowest first."""
    seen = []
    for bit in range(16):

        def flip(raw: npt.NDArray[np.uint8], bit: int = bit) -> None:
            raw[5, byte + bit // 8] ^= 1 << bit % 8

        broken = check(model, edited(file, tmp_path, {"blk.1.attn_q.weight": flip}), quant=quant).broken
        if broken:
            assert Q_PROJ in broken[0]
            seen.append(bit)
    return seen


@pytest.mark.parametrize(
    ("quant", "byte", "missed"),
    [("Q8_0", 34, 0), ("Q5_1", 26, 0), ("Q6_K", 208, 0), ("Q4_K_M", 0, 2), ("Q4_K_M", 2, 2), ("Q2_K", 80, 5)],
)
def test_a_bit_of_a_scale_is_seen(
    model: MergedModel, files: Callable[[str], Path], tmp_path: Path, quant: str, byte: int, missed: int
) -> None:
    """Every one where scales are known; elsewhere but for some of the lowest, which may move no code."""
    seen = seen_bits(model, files(quant), quant, tmp_path, byte)
    assert set(range(missed, 16)) <= set(seen)


def test_a_bit_of_a_scale_that_was_found_by_importances_is_seen_while_these_are_at_hand(
    model: MergedModel, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    entries = {
        gguf_names(model)[tensor.name]: Importance(
            np.exp(generator.standard_normal((1, tensor.shape[-1]))).astype(np.float32), np.array([3], np.float32)
        )
        for tensor in model.tensors
        if "self_attn" in tensor.name and "norm" not in tensor.name
    }
    given = tmp_path / "given.gguf"
    given.write_bytes(imatrix_bytes(entries, ("text",), 1, 512))
    out = tmp_path / "out"
    export_to(out, *inputs, format="gguf", quant="Q5_0", name="model", options={"imatrix": str(given)})
    file = out / "model-Q5_0.gguf"
    # Some tensors have importances, and some have none.
    assert check(model, file, quant="Q5_0").broken == ()
    (beside,) = out.glob("*imatrix*")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copyfile(beside, damaged / beside.name)
    assert set(range(1, 16)) <= set(seen_bits(model, file, "Q5_0", damaged, 22))
    beside.rename(tmp_path / "elsewhere")
    assert check(model, file, quant="Q5_0").broken == ()
    assert 0 not in seen_bits(model, file, "Q5_0", tmp_path, 22)
    beside.write_bytes(b"GGUF")
    (reason,) = check(model, file, quant="Q5_0").broken
    assert reason.startswith(f"{beside.name} is not readable: ")


def test_impossible_groups_are_named_by_tensor_and_place_unless_a_limit_is_broken(
    model: MergedModel, files: Callable[[str], Path], tmp_path: Path
) -> None:
    def flip(raw: npt.NDArray[np.uint8]) -> None:
        raw[5, 34] ^= 1
        raw[7, :] ^= np.tile(np.array([1] + [0] * 33, np.uint8), raw.shape[1] // 34)

    file = edited(
        files("Q8_0"), tmp_path, {"blk.1.attn_q.weight": flip, "blk.1.attn_k.weight": lambda raw: raw.fill(0)}
    )
    result = check(model, file, quant="Q8_0")
    zeros, flipped = sorted(result.broken)
    assert zeros.startswith(f"{Q_PROJ.replace('q_proj', 'k_proj')} is 100.00% off, ")
    assert re.fullmatch(
        rf"{Q_PROJ}: columns 32 to 63 of row 5: the scale is \S+ and should be \S+; "
        r"columns 0 to 31 of row 7: the scale .*; columns 32 to 63 of row 7: .*; and 6 more groups of columns",
        flipped,
    )
    summary = weights_json(result)
    assert summary is not None
    assert summary["broken"] == list(result.broken)


# --- GPTQ ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("gptq", True), ("gptq_v2", False)], ids=["v1", "v2"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MergedModel, Path]:
    """A folder of 4 bits in two groups a row, with and without zero points of its own, and what it was made from."""
    written, sym = request.param
    folder = tmp_path_factory.mktemp("gptq")
    made, _ = make_gptq(folder, checkpoint_format=written, sym=sym)
    return merged_model(folder / "base"), made


QUANT = "gptq-int4-g32"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_a_sound_gptq_folder_reads_as_the_plain_one(tmp_path: Path, bits: int, written: Any) -> None:
    made, plain = make_gptq(tmp_path, bits=bits, checkpoint_format=written)
    model = merged_model(tmp_path / "base")
    quant = f"gptq-int{bits}-g32"
    assert check(model, made, "gptq", quant).broken == ()
    reader = load_backend("gptq").read(model, quant, made)
    assert reader is not None
    expected = unpack_script().stored_tensors(plain)
    for name, weight in reader.weights.items():
        values = expected[name].read().reshape(-1, weight.shape[-1])
        whole = reader.rows(weight, 0, len(values))
        assert np.array_equal(whole.values, values), name
        if len(values) > 48:
            part = reader.rows(weight, 33, 9)
            assert np.array_equal(part.values, values[33:42]), name
            assert part.encoded is not None
            assert whole.encoded is not None
            assert np.array_equal(part.encoded, whole.encoded[33:42]), name


def zeros_off_by_one(tensors: dict[str, torch.Tensor], module: str) -> None:
    # One less in each of the eight zero points of a word.
    tensors[f"{module}.qzeros"] -= 0x11111111


def g_idx_reversed(tensors: dict[str, torch.Tensor], module: str) -> None:
    tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].flip(0).contiguous()


def scales_exchanged(tensors: dict[str, torch.Tensor], module: str) -> None:
    tensors[f"{module}.scales"] = tensors[f"{module}.scales"].flip(0).contiguous()


def a_bit_of_a_scale(tensors: dict[str, torch.Tensor], module: str) -> None:
    tensors[f"{module}.scales"].view(torch.int16)[1, 7] ^= 1 << 10


def noise(tensors: dict[str, torch.Tensor], module: str) -> None:
    tensors[f"{module}.qweight"][:, 3:5] = tensors[f"{module}.qweight"][:, 20:22]


@pytest.mark.parametrize("fault", [zeros_off_by_one, g_idx_reversed, scales_exchanged, a_bit_of_a_scale, noise])
def test_a_damaged_gptq_folder_is_flagged(
    packed: tuple[MergedModel, Path], tmp_path: Path, fault: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    model, folder = packed
    assert check(model, folder, "gptq", QUANT).broken == ()
    broken = copy(folder, tmp_path / "broken")
    module = Q_PROJ.removesuffix(".weight")
    edit_tensors(broken / "model.safetensors", lambda tensors: fault(tensors, module))
    # What contradicts the configuration is told of as well, before the weight.
    *stated, measured = check(model, broken, "gptq", QUANT).broken
    assert Q_PROJ in measured
    assert all(module in reason for reason in stated)


@pytest.mark.parametrize("bit", [0, 1, 2])
def test_a_bit_of_a_scale_that_our_solver_never_sets_is_flagged(
    packed: tuple[MergedModel, Path], tmp_path: Path, bit: int
) -> None:
    model, folder = packed
    broken, module = copy(folder, tmp_path / "broken"), Q_PROJ.removesuffix(".weight")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        for row in (7, 40):
            tensors[f"{module}.scales"].view(torch.int16)[1, row] ^= 1 << bit

    edit_tensors(broken / "model.safetensors", flip)
    (reason,) = check(model, broken, "gptq", QUANT).broken
    assert reason.startswith(f"{Q_PROJ}: columns 32 to 63 of row 7: the scale is ")
    assert "columns 32 to 63 of row 40" in reason
    # Whoever else wrote it may have such scales.
    assert check(model, broken, "gptqmodel", QUANT).broken == ()


def test_a_gptq_folder_that_contradicts_itself_is_flagged(packed: tuple[MergedModel, Path], tmp_path: Path) -> None:
    model, folder = packed
    module = Q_PROJ.removesuffix(".weight")
    broken = copy(folder, tmp_path / "broken")
    drop_tensor(broken / "model.safetensors", f"{module}.scales")
    only(check(model, broken, "gptq", QUANT), f"{module}.scales is missing")
    again = copy(folder, tmp_path / "again")

    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{module}.g_idx"].fill_(9)

    edit_tensors(again / "model.safetensors", beyond)
    only(check(model, again, "gptq", QUANT), f"{module}.g_idx does not number groups in order", module)
    assert "says gptq-int4-g32 and should say gptq-int8-g32" in check(model, folder, "gptq", "gptq-int8-g32").broken[0]
    (broken / "config.json").unlink()
    assert "config.json" in check(model, broken, "gptq", QUANT).broken[0]


def test_a_format_without_a_reader_is_not_looked_at(model: MergedModel, tmp_path: Path) -> None:
    class Other(Backend):
        name = "other"

        def default_quant(self, model: MergedModel) -> str:
            raise NotImplementedError

        def plan(self, model: MergedModel, quant: str, options: Any, *, verified: bool = False) -> OutputPlan:
            raise NotImplementedError

        def open(self, plan: OutputPlan, folder: Path, *, resume: bool) -> Writer:
            raise NotImplementedError

    assert read_weights(Other(), model, "Q", tmp_path, threads=1, checksums={}) is None


def test_a_change_that_was_left_out_is_no_negative_zero() -> None:
    assert survival_check(Sums(elements=1, delta=1.0, error_delta=-1.001), "of it").reason.startswith("of it 0% ")
