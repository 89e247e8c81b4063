"""GPTQModel as a backend: what is refused and planned without it, and (slow) what it makes, read back independently."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.backends.base import Writer
from exporter.backends.gptq.names import QUANTS, parse_quant, quant_name
from exporter.backends.gptqmodel.backend import GptqModelBackend
from exporter.backends.gptqmodel.writer import GptqModelWriter, _check_packed, _rounded, clean_config
from exporter.backends.output_plan import OutputPlan
from exporter.errors import (
    BackendError,
    RecipeError,
    RefusalError,
    UnknownQuantizationError,
    UnservableError,
    UnsupportedModelError,
)
from exporter.libraries import gptqmodel
from exporter.merge.model import MergedModel
from exporter.runtimes.transformers.runtime import Transformers
from exporter.tokens.windows import CalibrationWindows
from tests.exports import export_to
from tests.folders import copy, edit_json, hashes, listing
from tests.gptq import needs_gptqmodel, unpack_script
from tests.merged import merged_model, random_windows
from tests.tour.walk.test_walk import make_experts

Make = Callable[..., Path]


def calibrated(ids: Sequence[Sequence[int]]) -> CalibrationWindows:
    return CalibrationWindows(tuple(map(tuple, ids)), len(ids[0]) if ids else 0, "text", 0, "")


FORCED = {"force_unservable": "true"}
CALIBRATION = calibrated(random_windows(8, 48, 384).ids)


@pytest.fixture
def model(make_base: Make) -> MergedModel:
    return merged_model(make_base("qwen2"))


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning needs to find the packages, and no more of them."""
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ())


def test_names() -> None:
    assert len(set(QUANTS)) == 16
    assert {"gptq-int4-g128", "gptq-int3-g32", "gptq-int8-gall"} <= set(QUANTS)
    for name in QUANTS:
        parsed = parse_quant(name)
        assert parsed is not None
        assert quant_name(*parsed) == name
    assert parse_quant("INT4-G128") == (4, 128)
    assert parse_quant("int2-gALL") == (2, -1)
    assert [parse_quant(name) for name in ("int5-g128", "int4-g16", "int4", "4", "q4_k_m", "int4-g-1")] == [None] * 6


def test_without_the_packages_it_is_refused(model: MergedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ("gptqmodel",))
    with pytest.raises(RecipeError, match="pip install") as caught:
        GptqModelBackend().plan(model, "int4-g32", {})
    assert caught.value.found == "no gptqmodel"
    assert caught.value.exit_status == 2


@pytest.mark.usefixtures("_installed")
def test_the_plan(model: MergedModel) -> None:
    backend = GptqModelBackend()
    assert backend.default_quant(model) == "gptq-int4-g64"
    plan = backend.plan(model, "INT4-G32", {})
    assert (plan.quant, plan.needs, plan.entry) == ("gptq-int4-g32", "tokens", ".")
    assert plan.runtimes == ("vllm", "transformers")
    assert plan.temporary_bytes > model.parameters * 2
    assert {source for tensor in plan.tensors for source in tensor.sources} == {tensor.name for tensor in model.tensors}
    assert sum(tensor.type == "INT4" for tensor in plan.tensors) == 14
    assert "bf16" in plan.notes[0]
    assert "tokenizer.json" in plan.copies


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("quant", "options", "reason"),
    [
        ("int3-g32", {}, "3 bits"),
        ("int2-g32", {}, "2 bits"),
        ("int4-g32", {"sym": "false"}, "zero points"),
        ("int4-g32", {"desc_act": "true"}, "desc_act"),
    ],
)
def test_what_no_server_takes_is_refused(model: MergedModel, quant: str, options: dict[str, Any], reason: str) -> None:
    backend = GptqModelBackend()
    with pytest.raises(UnservableError) as caught:
        backend.plan(model, quant, options)
    assert reason in caught.value.found
    assert "--force-unservable" in caught.value.remedy
    forced = backend.plan(model, quant, options | FORCED)
    assert forced.runtimes == ("transformers",)
    assert any(reason in note for note in forced.notes)


@pytest.mark.usefixtures("_installed")
def test_transformers_is_not_promised_for_packed_experts(tmp_path: Path) -> None:
    plan = GptqModelBackend().plan(merged_model(make_experts(tmp_path / "base")), "int4-g32", {})
    assert plan.runtimes == ("vllm",)
    assert any(one.experts for one in plan.packed)


def test_the_process_is_told_device_and_threads(
    model: MergedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they are is read from the job and the environment that a stand-in for the worker was given."""
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ())
    monkeypatch.delenv(gptqmodel.WORKERS, raising=False)
    stand_in, seen = tmp_path / "worker.py", tmp_path / "seen.json"
    stand_in.write_text(
        "import json, os, sys\njob = json.load(open(sys.argv[1]))\n"
        f"names = {gptqmodel.WORKERS!r}, 'CUDA_VISIBLE_DEVICES'\n"
        "seen = [job['device'], job['threads'], *map(os.environ.get, names)]\n"
        f"json.dump(seen, open({str(seen)!r}, 'w'))\nsys.exit('seen')\n"
    )
    monkeypatch.setattr("exporter.backends.gptqmodel.writer.WORKER", stand_in)
    values: dict[str, Any] = {"format": "gptqmodel", "quant": "int4-g32", "threads": 3}
    with pytest.raises(BackendError, match="seen"):
        export_to(tmp_path / "out", model.base.folder, **values, calibration={"tokens": 128, "window": 64})
    assert json.loads(seen.read_text()) == ["cpu", 3, "3", ""]


@pytest.mark.usefixtures("_installed")
def test_the_settings_that_stop_an_answer_are_written(make_base: Make, tmp_path: Path) -> None:
    """Where the sources of stop tokens disagree, generation_config.json is not among what is copied."""
    base = copy(make_base("qwen2"), tmp_path / "base")
    edit_json(base / "config.json", eos_token_id=3)
    edit_json(base / "generation_config.json", eos_token_id=3)
    plan = GptqModelBackend().plan(merged_model(base), "int4-g32", {})
    assert "generation_config.json" not in plan.copies
    assert len(json.loads(plan.documents["generation_config.json"])["eos_token_id"]) == 2
    assert plan.documents.keys() == {"generation_config.json"}


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("quant", "options", "error"),
    [
        ("int5-g32", {}, UnknownQuantizationError),
        ("int4-g128", {}, UnsupportedModelError),
        ("int4-g32", {"damp": "2"}, RecipeError),
        ("int4-g32", {"damp": "much"}, RecipeError),
        ("int4-g32", {"sym": "perhaps"}, RecipeError),
        ("int4-g32", {"max_shard_size": "none"}, RecipeError),
        ("int4-g32", {"dump": 0.1}, RecipeError),
    ],
)
def test_what_it_cannot_do_is_refused(
    model: MergedModel, quant: str, options: dict[str, Any], error: type[RefusalError]
) -> None:
    with pytest.raises(error):
        GptqModelBackend().plan(model, quant, options)


def test_matrices_that_were_only_rounded_are_told(tmp_path: Path) -> None:
    (tmp_path / "quant_log.csv").write_text(
        "layer,module,loss,samples,damp,time\n0,self_attn.k_proj,0.01,64,0.05,0.1\n"
        "1,mlp.up_proj,fallback(rtn): 0.001,3,0.05,0.1\n2,mlp.up_proj,rtn fallback,3,0.05,0.1\n"
    )
    assert _rounded(tmp_path / "quant_log.csv") == ("layers.1.mlp.up_proj", "layers.2.mlp.up_proj")


@pytest.mark.usefixtures("_installed")
def test_matrices_that_were_not_packed_or_should_not_be_are_told(model: MergedModel, tmp_path: Path) -> None:
    plan = GptqModelBackend().plan(model, "int4-g32", {})
    packed = [tensor.name.removesuffix(".weight") for tensor in plan.tensors if tensor.type == "INT4"]
    for names, words in ((packed[1:], "13 packed matrices"), ([*packed, "lm_head"], "lm_head is packed")):
        save_file({f"{name}.qweight": torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
        with pytest.raises(BackendError, match=words) as caught:
            _check_packed(tmp_path, plan)
        assert caught.value.expected == "14"
    save_file({f"{name}.qweight": torch.zeros(1) for name in packed}, tmp_path / "model.safetensors")
    _check_packed(tmp_path, plan)


def test_the_configuration_says_nothing_of_the_machine(tmp_path: Path) -> None:
    base, made = tmp_path / "base.json", tmp_path / "made.json"
    base.write_text(json.dumps({"vocab_size": 4, "dtype": "bfloat16"}))
    meta = {"offload_to_disk_path": "/tmp/x", "offload_to_disk": True, "damp_percent": 0.05}
    made.write_text(json.dumps({"vocab_size": 5, "quantization_config": {"bits": 4, "meta": meta}}))
    assert json.loads(clean_config(base, made)) == {
        "vocab_size": 4,
        "dtype": "bfloat16",
        "quantization_config": {"bits": 4, "meta": {"damp_percent": 0.05}},
    }


# --- GPTQModel itself ------------------------------------------------------------------------------------------------


def write(model: MergedModel, plan: OutputPlan, folder: Path, *, resume: bool = False, threads: int = 2) -> Writer:
    """A writer that has every tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = GptqModelBackend().open(plan, folder, resume=resume)
    writer.place("cpu", threads)
    weights = load_file(model.base.folder / "model.safetensors")
    for tensor in plan.tensors:
        block = weights[tensor.sources[0]].float().reshape(tensor.rows, tensor.columns)
        half = tensor.rows // 2
        writer.write(tensor, half, block[half:])
        if half:
            writer.write(tensor, 0, block[:half])
    writer.sync()
    return writer


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize(
    ("quant", "options"), [("int4-g32", {}), ("int8-g32", {"sym": "false", "desc_act": "true", "damp": "0.1"} | FORCED)]
)
def test_what_it_makes_is_the_model_rounded(
    model: MergedModel, tmp_path: Path, quant: str, options: dict[str, Any]
) -> None:
    plan = GptqModelBackend().plan(model, quant, options)
    out = tmp_path / "staging" / "files"
    writer = write(model, plan, out)
    made = writer.finish(CALIBRATION)
    writer.close()
    assert isinstance(writer, GptqModelWriter)
    assert made.notes == ()
    assert set(made.names) == listing(out) == {"model.safetensors", "config.json"}
    assert (out / "model.safetensors").stat().st_size == pytest.approx(plan.made["model.safetensors"], rel=0.1)
    config = json.loads((out / "config.json").read_text())
    written = config["quantization_config"]
    assert (written["bits"], written["group_size"], written["quant_method"]) == (int(quant[3]), 32, "gptq")
    assert (written["sym"], written["desc_act"]) == (not options, bool(options))
    assert written["meta"]["damp_percent"] == (0.1 if options else 0.05)
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert b"/tmp" not in file.read_bytes()
    unpack_script().unpack_folder(out, tmp_path / "unpacked")
    base = load_file(model.base.folder / "model.safetensors")
    found = load_file(tmp_path / "unpacked" / "model-00001.safetensors")
    assert found.keys() == base.keys()
    for name, weight in found.items():
        error = (weight - base[name].float()).norm() / base[name].float().norm()
        assert (
            error < (0.2 if quant.startswith("int4") else 0.01)
            if "_proj" in name and "bias" not in name
            else error == 0
        )
    windows = random_windows(2, 32, 384)
    scores = [Transformers().score(folder, windows, lambda _: None) for folder in (out, tmp_path / "unpacked")]
    assert np.abs(scores[0].log_probabilities - scores[1].log_probabilities).mean() < 0.02
    # A run that goes on makes nothing again.
    assert not (tmp_path / "staging" / "scratch" / f"gptqmodel-gptq-{quant}" / "merged").exists()
    before = hashes(out)
    assert write(model, plan, out, resume=True).finish(CALIBRATION) == made
    assert hashes(out) == before


@pytest.mark.slow
@needs_gptqmodel
def test_the_same_inputs_give_the_same_bytes(model: MergedModel, tmp_path: Path) -> None:
    plan = GptqModelBackend().plan(model, "int4-g32", {})
    for name, threads in (("a", 1), ("b", 3)):
        write(model, plan, tmp_path / name / "files", threads=threads).finish(CALIBRATION)
    assert hashes(tmp_path / "a" / "files") == hashes(tmp_path / "b" / "files")


@pytest.mark.slow
@needs_gptqmodel
def test_its_failure_is_quoted(model: MergedModel, tmp_path: Path) -> None:
    plan = GptqModelBackend().plan(model, "int4-g32", {})
    writer = write(model, plan, tmp_path / "files")
    with pytest.raises(BackendError, match="no calibration"):
        writer.finish(None)
    with pytest.raises(BackendError, match="beyond the vocabulary"):
        writer.finish(calibrated([[10**6] * 32]))
    with pytest.raises(BackendError, match="status 1: ZeroDivisionError") as caught:
        writer.finish(calibrated([[1, 2]]))
    assert caught.value.thing == "gptqmodel gptq-int4-g32"
    assert listing(tmp_path / "files") == set()
