"""The whole flow: atomic publishing, resuming after a kill, the same bytes every time, and inputs left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from exporter import ExporterError, Recipe, ReferenceRecipe, export, make_reference
from exporter.artifact.staging import Staging
from exporter.errors import OutOfMemoryError, OutputExistsError, StagingInUseError, WriteError
from exporter.pipeline.plan import make_plan
from exporter.pipeline.publish import staging_key
from exporter.plan.reporter import Reporter
from exporter.recipe import Execution
from tests.commands import invoke
from tests.exports import export_to, recipe, refused
from tests.folders import copy, edit_tensors, hashes, listing
from tests.interruption import ROOT, SlowRun, journaled

Make = Callable[..., Path]

SMALL = {"tokens": 128, "max_tokens": 128, "n_ctx": 64}
# The small models are random, and the built-in limits are not made for them.
LENIENT = SMALL | {"gate": {"*": 1.0}}
FEW = {"tokens": 128, "window": 64}


@pytest.fixture
def base(make_base: Make) -> Path:
    return make_base()


@pytest.fixture
def adapter(base: Path, make_adapter: Make) -> Path:
    return make_adapter(base)


# --- publishing ------------------------------------------------------------------------------------------------------


def test_output_appears_whole_and_nothing_else_is_left(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = export_to(tmp_path / "deep" / "down" / "out", base, adapter)
    assert result.passed
    assert listing(tmp_path) == {"deep", "deep/down", "deep/down/out"} | {
        f"deep/down/out/{name}"
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "README.md",
            "export.json",
            "report.html",
        )
    }
    manifest = json.loads((result.folders[0].path / "export.json").read_text())
    found = hashes(result.folders[0].path)
    del found["export.json"], found["README.md"], found["report.html"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found


def test_runs_repeat_byte_for_byte(base: Path, adapter: Path, tmp_path: Path) -> None:
    runs = []
    for name, threads, block_bytes in (("first", 1, 4096), ("second", 3, 1 << 20)):
        outputs = [
            {"format": "safetensors", "out": tmp_path / name / "st"},
            {"format": "gguf", "out": tmp_path / name / "gguf", "quant": "Q4_K_M"},
        ]
        values: dict[str, Any] = {"base": str(base), "adapters": [str(adapter)], "outputs": outputs, "name": "merged"}
        values |= {"evaluation": LENIENT, "calibration": FEW}
        assert export(Recipe.build(values), Execution(threads=threads, block_bytes=block_bytes)).passed
        runs.append(hashes(tmp_path / name))
    assert runs[0] == runs[1]
    assert {"st/export.json", "st/report.html", "gguf/export.json"} <= runs[0].keys()
    texts = [(tmp_path / "first" / "st" / name).read_text() for name in ("export.json", "README.md", "report.html")]
    texts.append((tmp_path / "first" / "gguf" / "Modelfile").read_text())
    for trace in (str(tmp_path), str(base.parent), socket.gethostname(), "first"):
        assert not any(trace in text for text in texts)


def test_inputs_are_left_as_they_were(base: Path, adapter: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[str, int, int]]:
        digests = {folder / name: digest for folder in (base, adapter) for name, digest in hashes(folder).items()}
        return {
            str(path): (digest, path.stat().st_mtime_ns, path.stat().st_mode) for path, digest in digests.items()
        } | {str(folder): ("", folder.stat().st_mtime_ns, folder.stat().st_mode) for folder in (base, adapter)}

    before = state()
    export_to(tmp_path / "out", base, adapter, verify=True, evaluation=SMALL)
    export_to(tmp_path / "gguf", base, adapter, format="gguf", quant="Q8_0")
    assert state() == before


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_replaces(base: Path, adapter: Path, tmp_path: Path, kind: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    if kind == "folder":
        copy(elsewhere, out)
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(elsewhere)
    refused(OutputExistsError, out, base, adapter)
    export_to(out, base, adapter, force=True)
    assert out.is_dir()
    assert not out.is_symlink()
    assert "model.safetensors" in listing(out)
    assert "kept" not in listing(out)
    assert listing(elsewhere) == {"kept"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_force_keeps_what_is_there_until_the_gate_passes(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_to(out, base)
    before = hashes(out)
    strict = SMALL | {"gate": {"*": 0.0}}
    result = export_to(out, base, adapter, force=True, quant="fp16", verify=True, evaluation=strict)
    assert not result.passed
    assert hashes(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.rejected"}


class Listener(Reporter):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.tours = self.bytes = 0

    def touring(self, plan: Any, device: str, *, resumed: bool) -> None:
        self.tours += 1

    def read(self, nbytes: int) -> None:
        self.bytes += nbytes


# --- the gate --------------------------------------------------------------------------------------------------------


def test_failed_gate(base: Path, adapter: Path, tmp_path: Path) -> None:
    out, rejected = tmp_path / "out", tmp_path / "out.rejected"
    rejected.mkdir()
    (rejected / "of an earlier run").write_text("x")
    arguments = ("--base", base, "--adapter", adapter, "--format", "safetensors", "--out", out, "--json")
    # No rounding is without a divergence, while a change of perplexity may be none.
    result = invoke("export", *arguments, "--gate", "bf16:kl=0", "--eval-tokens", "512", "--eval-window", "64")
    assert result.exit_code == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out.rejected"}
    manifest = json.loads((rejected / "export.json").read_text())
    assert json.loads(result.stdout) == manifest
    verification = manifest["artifacts"][0]["verification"]
    assert verification["verdict"] == "failed"
    assert verification["gate"]["max_divergence"] == 0
    assert verification["broken"]
    found = hashes(rejected)
    assert found.keys() == manifest["files"].keys() | {"export.json", "README.md", "report.html"}
    assert all(found[name] == entry["sha256"] for name, entry in manifest["files"].items())
    assert str(rejected) in result.stderr.replace("\n", "")
    # The way is free for the next attempt.
    assert invoke("export", *arguments, "--no-verify").exit_code == 0


def test_gate_of_one_output_fails(base: Path, adapter: Path, tmp_path: Path) -> None:
    outputs = [{"format": "safetensors", "out": tmp_path / quant, "quant": quant} for quant in ("fp32", "bf16")]
    evaluation = SMALL | {"gate": {"fp32": 0.5, "bf16": {"kl": 0.0}}, "max_tokens": 128}
    values = {"base": str(base), "adapters": [str(adapter)], "outputs": outputs, "evaluation": evaluation}
    listener = Listener()
    result = export(Recipe.build(values), reporter=listener)
    # One tour, from which both are judged.
    assert listener.tours == 1
    assert not result.passed
    assert [folder.published for folder in result.folders] == [True, False]
    assert [folder.path.name for folder in result.folders] == ["fp32", "bf16.rejected"]
    assert not (tmp_path / "bf16").exists()


def test_artifact_that_overflows_when_it_runs(make_base: Make, tmp_path: Path) -> None:
    # Every weight fits float16, and what is computed from them does not: a verdict or an error, never a traceback.
    base = copy(make_base(dtype="float32"), tmp_path / "base")

    def enlarge(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name] * 3e4

    edit_tensors(base / "model.safetensors", enlarge)
    try:
        result = export_to(tmp_path / "out", base, quant="fp16", verify=True, evaluation=SMALL)
    except ExporterError:
        pass
    else:
        assert not result.passed
    assert not (tmp_path / "out").exists()


# --- several outputs, one tour ---------------------------------------------------------------------------------------


def test_several_outputs_in_one_recipe(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    outputs: list[dict[str, Any]] = [
        {"format": "safetensors", "out": "together/st", "quant": "bf16", "options": {"max_shard_size": "100KB"}},
        {"format": "safetensors", "out": "together/st32", "quant": "fp32"},
        {"format": "gguf", "out": "together/gguf", "quant": ["Q8_0", "F16"]},
    ]
    values: dict[str, Any] = {"base": str(base), "adapters": str(adapter), "name": "m", "verify": False}
    file.write_text(yaml.safe_dump(values | {"outputs": outputs}))
    listener = Listener()
    result = export(Recipe.load(file), reporter=listener)
    assert result.passed
    assert listener.tours == 1
    assert listener.bytes == result.plan.input_bytes
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == ["gguf", "st", "st32"]
    for number, output in enumerate(outputs):
        out = tmp_path / "alone" / str(number)
        export(Recipe.build(values | {"outputs": [output | {"out": out}]}))
        assert hashes(out) == hashes(tmp_path / str(output["out"]))


# --- runs that fail, meet or are stopped -----------------------------------------------------------------------------


def test_two_runs_at_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Staging(out, "of another run")
    (first.files / "half").write_text("x")
    arguments = ("--base", base, "--adapter", adapter, "--format", "safetensors", "--out", out, "--no-verify")
    result = invoke("export", *arguments)
    assert result.exit_code == 2
    assert "one run at a time" in result.stderr
    assert (first.files / "half").read_text() == "x"
    first.close()
    assert invoke("export", *arguments).exit_code == 0


def test_second_output_in_use_leaves_nothing_of_the_first(base: Path, tmp_path: Path) -> None:
    other = Staging(tmp_path / "second", "of another run")
    before = listing(tmp_path)
    outputs = [{"format": "safetensors", "out": tmp_path / name} for name in ("first", "second")]
    with pytest.raises(StagingInUseError):
        export(Recipe.build({"base": str(base), "outputs": outputs, "verify": False}))
    assert listing(tmp_path) == before
    other.close()


def test_full_disk_is_a_failure_and_not_a_refusal(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(WriteError, match="No space left"):
            export_to(tmp_path / "out", base, adapter)
        arguments = ("--base", base, "--format", "safetensors", "--out", tmp_path / "other", "--no-verify")
        assert invoke("export", *arguments).exit_code == 1
    assert not {"out", "other"} & listing(tmp_path)
    export_to(tmp_path / "out", base, adapter)


def test_full_disk_in_the_middle_goes_on_afterwards(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 0
    write = os.pwrite

    def fills_up(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: max(1, len(data) // 2)], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fills_up)
        with pytest.raises(WriteError):
            export_to(tmp_path / "out", base, adapter, threads=1)
    assert "out" not in listing(tmp_path)
    export_to(tmp_path / "out", base, adapter)
    export_to(tmp_path / "undisturbed", base, adapter)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def deep(make_base: Make, make_adapter: Make) -> tuple[Path, Path]:
    base = make_base("qwen3", layers=6)
    return base, make_adapter(base)


def slow_arguments(inputs: tuple[Path, Path], out: Path) -> list[str | Path]:
    base, adapter = inputs
    recipe_file = out.parent / "recipe.yaml"
    outputs = [
        {"format": "safetensors", "out": str(out), "options": {"max_shard_size": "300KB"}},
        {"format": "gguf", "out": f"{out}-gguf", "quant": ["Q8_0", "Q4_0"]},
    ]
    values = {"base": str(base), "adapters": str(adapter), "outputs": outputs, "name": "m", "verify": False}
    recipe_file.write_text(yaml.safe_dump(values))
    return ["export", recipe_file, "--device", "cpu", "--threads", "2"]


def test_killed_runs_go_on_and_give_the_same_bytes(
    deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()
    run = SlowRun(slow_arguments(deep, undisturbed / "out"), undisturbed, pause=0)
    assert run.wait() == 0, run.log.read_text()
    total = len(run.merged.read_text().split())
    expected = hashes(undisturbed / "out") | {f"gguf/{name}": d for name, d in hashes(undisturbed / "out-gguf").items()}

    out, staging = disturbed / "out", disturbed / ".out.staging"
    moments = random.Random(0)
    for moment in (0, moments.randint(3, total // 3), moments.randint(total // 3 + 5, total - 5), total):
        before = journaled(staging)
        run = SlowRun(slow_arguments(deep, out), disturbed)
        run.wait_until(staging, max(before, moment))
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert {path.name for path in disturbed.iterdir() if "out" in path.name} <= {
            ".out.staging",
            ".out-gguf.staging",
        }
        assert before <= journaled(staging) <= total
    run.merged.unlink()
    run = SlowRun(slow_arguments(deep, out), disturbed, pause=0)
    assert run.wait() == 0, run.log.read_text()
    assert "going on with an earlier run" in run.log.read_text()
    # What was on the disk is not merged again; the journals of the two outputs may be one tensor apart.
    assert not run.merged.exists() or len(set(run.merged.read_text().split())) <= 2
    assert hashes(out) | {f"gguf/{name}": d for name, d in hashes(disturbed / "out-gguf").items()} == expected
    assert not staging.exists()


def test_run_that_goes_on_merges_only_the_rest(
    deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    out, staging = tmp_path / "out", tmp_path / ".out.staging"
    run = SlowRun(slow_arguments(deep, out), tmp_path)
    run.wait_until(staging, 20)
    run.signal(signal.SIGKILL)
    run.wait()
    kept = {json.loads(line)[1] for line in (staging / "journal").read_text().splitlines() if line.endswith("]")}
    run.merged.unlink()
    run = SlowRun(slow_arguments(deep, out), tmp_path, pause=0)
    assert run.wait() == 0, run.log.read_text()
    again = set(run.merged.read_text().split())
    # The other output's journal may be one step behind when the kill falls between the two.
    assert len(kept & again) <= 2
    assert kept | again == {
        entry["name"] for entry in json.loads((out / "export.json").read_text())["artifacts"][0]["tensors"]
    }


def test_other_options_do_not_go_on_from_an_earlier_run(
    deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    base, adapter = deep
    out, staging = tmp_path / "out", tmp_path / ".out.staging"
    inputs = ("--base", base, "--adapter", adapter, "--format", "safetensors", "--no-verify")
    run = SlowRun(["export", *inputs, "--out", out], tmp_path)
    run.wait_until(staging, 20)
    run.signal(signal.SIGKILL)
    run.wait()
    export_to(out, base, adapter, quant="fp32")
    export_to(tmp_path / "undisturbed", base, adapter, quant="fp32")
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_key_of_a_staging_folder_knows_every_option(deep: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = deep
    output = {"format": "gguf", "out": str(tmp_path / "out"), "quant": "Q8_0"}
    values = {"base": str(base), "adapters": str(adapter), "outputs": [output], "verify": False}
    plan = make_plan(Recipe.build(values), Execution(device="cpu", threads=1))
    (folder,) = plan.folders
    assert staging_key(plan, folder) == staging_key(plan, replace(folder))
    # One that shows in no header and no document, as GPTQModel's damping.
    assert staging_key(plan, folder) != staging_key(plan, replace(folder, options={"damp": 0.1}))


def test_changed_input_does_not_go_on_from_an_earlier_run(
    deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    base, adapter = copy(deep[0], tmp_path / "inputs" / "base"), copy(deep[1], tmp_path / "inputs" / "adapter")
    out, staging = tmp_path / "out", tmp_path / ".out.staging"
    inputs = ("--base", base, "--adapter", adapter, "--format", "safetensors", "--no-verify")
    run = SlowRun(["export", *inputs, "--out", out], tmp_path)
    run.wait_until(staging, 20)
    run.signal(signal.SIGKILL)
    run.wait()
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: -tensor for name, tensor in tensors.items() if "lora_B" in name}),
    )
    export_to(out, base, adapter)
    export_to(tmp_path / "undisturbed", base, adapter)
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_interrupted_run(deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    out, staging = tmp_path / "out", tmp_path / ".out.staging"
    # So slow that it is still at it when the signal comes, on the busiest machine.
    run = SlowRun(slow_arguments(deep, out), tmp_path, pause=0.2)
    run.wait_until(staging, 10)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    log = run.log.read_text()
    assert "interrupted" in log
    assert "Traceback" not in log
    assert not out.exists()
    run = SlowRun(slow_arguments(deep, out), tmp_path, pause=0)
    assert run.wait() == 0
    assert "going on with an earlier run" in run.log.read_text()


def test_running_out_of_memory_is_an_error_of_ours_and_the_run_goes_on(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate_too_much(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60)

    with monkeypatch.context() as patched:
        patched.setattr("exporter.pipeline.export.finish_files", allocate_too_much)
        with pytest.raises(OutOfMemoryError, match="4611686018427387904 bytes"):
            export_to(tmp_path / "out", base, adapter)
    assert (tmp_path / ".out.staging").is_dir()
    assert export_to(tmp_path / "out", base, adapter).passed
    monkeypatch.setattr("exporter.reference.pack.make.walk_reference", allocate_too_much)
    sources = {"base": str(base), "adapters": [str(adapter)], "out": tmp_path / "pack"}
    wanted = ReferenceRecipe.build(sources | {"evaluation": SMALL})
    with pytest.raises(OutOfMemoryError, match="4611686018427387904 bytes"):
        make_reference(wanted)


def test_run_beside_a_running_one(deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    out, staging = tmp_path / "out", tmp_path / ".out.staging"
    run = SlowRun(slow_arguments(deep, out), tmp_path)
    run.wait_until(staging, 5)
    with pytest.raises(StagingInUseError):
        export(recipe(*deep[:1], deep[1:], out))
    assert run.wait() == 0, run.log.read_text()
    assert "model-00001-of" in " ".join(listing(out))
