"""What is refused of paths, disk and memory before a byte is written, and that the plan tells the truth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from exporter import Recipe, export, make_plan
from exporter.errors import (
    MissingFileError,
    NotEnoughDiskError,
    NotEnoughMemoryError,
    OutputExistsError,
    OverlappingPathsError,
    RecipeError,
    RefusalError,
)
from exporter.pipeline import plan as plan_module
from exporter.plan import estimate
from exporter.plan.as_json import describe
from exporter.plan.resources import check_device_memory, check_memory
from exporter.recipe import Execution
from exporter.tokens.positions import positions_of
from exporter.tokens.windows import TokenSets
from exporter.tour.walk.sizes import BATCH_TOKENS
from tests.exports import export_to, recipe, refused
from tests.folders import copy, hashes, listing

Make = Callable[..., Path]
FEW: dict[str, Any] = {
    "calibration": {"text": Path(__file__), "tokens": 128, "window": 32},
    "evaluation": {"n_ctx": 64, "tokens": 64},
}


class Usage(NamedTuple):
    """As `shutil.disk_usage` returns it."""

    total: int
    used: int
    free: int


class Memory(NamedTuple):
    """As much of `psutil.virtual_memory` as is asked for."""

    available: int


@pytest.fixture
def base(make_base: Make, tmp_path: Path) -> Path:
    return copy(make_base(), tmp_path / "inputs" / "base")


@pytest.fixture
def adapter(make_base: Make, make_adapter: Make, tmp_path: Path) -> Path:
    return copy(make_adapter(make_base()), tmp_path / "inputs" / "adapter")


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link", "dangling link"])
def test_output_that_exists(base: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if "folder" in kind:
        out.mkdir()
    if kind == "folder":
        (out / "precious").write_text("x")
    elif kind == "file":
        out.write_text("x")
    elif kind == "link":
        out.symlink_to(base)
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nothing")
    caught = refused(OutputExistsError, out, base)
    assert isinstance(caught, FileExistsError)
    assert "--force" in caught.remedy


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("where", ["the input itself", "inside the input", "deep inside the input", "around the input"])
def test_output_that_overlaps_an_input(base: Path, adapter: Path, where: str, which: str, force: bool) -> None:
    source = base if which == "base" else adapter
    out = {
        "the input itself": source,
        "inside the input": source / "out",
        "deep inside the input": source / "a" / "b" / "out",
        "around the input": source.parent,
    }[where]
    # An output that is there and may not be replaced is refused for that reason first.
    exists = where in ("the input itself", "around the input") and not force
    with pytest.raises(RefusalError) as caught:
        export_to(out, base, adapter, force=force)
    assert type(caught.value) is (OutputExistsError if exists else OverlappingPathsError)
    assert not (source / "a").exists()
    assert listing(base.parent) == {"base", "adapter"} | {
        str(path.relative_to(base.parent)) for folder in (base, adapter) for path in folder.iterdir()
    }


def test_output_that_overlaps_an_input_through_a_link(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(base)
    refused(OverlappingPathsError, tmp_path / "elsewhere" / "out", base)
    refused(OverlappingPathsError, base / "out", tmp_path / "elsewhere")


def test_calibration_inside_an_output_that_is_replaced(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "text.txt").write_text("Evaluation text. " * 400)
    values = {"calibration": {"text": out / "text.txt"}, "evaluation": {"n_ctx": 64, "tokens": 64}}
    with pytest.raises(OverlappingPathsError):
        make_plan(recipe(base, [], out, force=True, verify=True, **values), Execution())


def test_rejected_folder_that_is_an_input(base: Path, tmp_path: Path) -> None:
    # A failed gate replaces OUT.rejected: it must not be what the run reads from.
    rejected = base.rename(tmp_path / "out.rejected")
    before = hashes(rejected)
    evaluation = {"n_ctx": 64, "tokens": 64, "gate": {"*": 0.0}}
    with suppress(OverlappingPathsError):
        export(recipe(rejected, [], tmp_path / "out", quant="fp16", verify=True, evaluation=evaluation))
    assert hashes(rejected) == before


@pytest.mark.parametrize("inner", ["out/inner", "out/a/b"])
def test_outputs_inside_each_other(base: Path, tmp_path: Path, inner: str) -> None:
    outputs = [{"format": "safetensors", "out": tmp_path / path} for path in ("out", inner)]
    before = listing(tmp_path)
    for order in (outputs, outputs[::-1]):
        with pytest.raises(RefusalError):
            export(Recipe.build({"base": str(base), "outputs": order, "verify": False}))
        assert listing(tmp_path) == before


def test_output_under_a_file(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RefusalError):
        export_to(tmp_path / "file" / "out", base)


@pytest.mark.parametrize("out", [".", "..", "missing/.."])
def test_output_without_a_name_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    workplace = tmp_path / "workplace" / "inner"
    workplace.mkdir(parents=True)
    monkeypatch.chdir(workplace)
    with pytest.raises(RefusalError):
        export_to(Path(out), base, force=True)
    assert listing(tmp_path / "workplace") == {"inner"}


def test_not_enough_disk(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(10**12, 10**12 - 100_000, 100_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    caught = refused(NotEnoughDiskError, tmp_path / "deep" / "down" / "out", base, adapter)
    assert asked == [tmp_path]
    assert "GB free" in caught.found


def test_disk_of_several_outputs_is_added_up(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_plan(recipe(base, [], tmp_path / "a"), Execution())
    slack = 8 << 20
    outputs = [{"format": "safetensors", "out": tmp_path / name} for name in "ab"]
    both = Recipe.build({"base": str(base), "outputs": outputs, "verify": False})
    free = 2 * (one.disk_bytes + slack)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
    assert make_plan(both, Execution()).disk_bytes == 2 * one.disk_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free - 1))
    with pytest.raises(NotEnoughDiskError):
        make_plan(both, Execution())


@pytest.mark.parametrize("resumed", [False, True])
def test_not_enough_memory_on_the_device(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """Refused before the walk; what an earlier run left stays, and nothing else is left."""
    import torch

    from exporter.pipeline import tour as drive

    wanted = recipe(base, [], tmp_path / "out", verify=True, **{**FEW, "evaluation": {"n_ctx": 64, "tokens": 128}})
    needed = make_plan(wanted, Execution()).walk.device_memory
    assert needed > 0
    free = [needed]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free[0], 1 << 40))
    check_device_memory("cuda:0", needed)
    free[0] -= 1
    check_device_memory("cpu", needed)
    monkeypatch.setattr(drive, "resolve_device", lambda _name: "cuda:0")
    if resumed:
        with monkeypatch.context() as patched:
            patched.setattr(drive, "check_device_memory", stopping)
            with pytest.raises(KeyboardInterrupt):
                export(wanted, Execution())
    with pytest.raises(NotEnoughMemoryError) as caught:
        export(wanted, Execution())
    assert caught.value.thing == "the walk through the layers on cuda:0"
    assert (tmp_path / ".out.staging").exists() == resumed
    assert not (tmp_path / "out").exists()


def stopping(*_arguments: Any) -> None:
    raise KeyboardInterrupt


def test_not_enough_memory_for_the_reference(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(100_000))
    evaluation = {"n_ctx": 256, "tokens": 4096}
    caught = refused(NotEnoughMemoryError, tmp_path / "out", base, verify=True, evaluation=evaluation)
    assert "--no-verify" in caught.remedy
    assert make_plan(recipe(base, [], tmp_path / "out", verify=False), Execution()).walk_bytes == 0


def test_only_what_needs_less_memory_is_recommended(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few tokens in a pass and few rows of the head, so that a layer weighs most, as it does in a large model.
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 1)
    monkeypatch.setattr(estimate, "HEAD_ROWS", 1)
    monkeypatch.setattr(estimate, "LOGIT_ROWS", 1)
    # What scores is not asked for anything here, and need not be installed.
    served = Execution(endpoint="http://localhost:8000")
    gptq = {"format": "gptq", "quant": "gptq-int4-g32"}
    for values, helpful in (({}, "bfloat16"), (gptq, "no Hessians")):
        given = recipe(base, [], tmp_path / "out", **(FEW | values | {"verify": True}))
        needed = make_plan(given, served).walk_bytes
        with monkeypatch.context() as patched:
            patched.setattr(psutil, "virtual_memory", lambda needed=needed: Memory(needed - 1))
            with pytest.raises(NotEnoughMemoryError) as caught:
                make_plan(given, served)
        assert helpful in caught.value.remedy
        assert ("bfloat16" in caught.value.remedy) == (not values)


def test_hidden_states_that_are_many_for_the_memory_go_to_the_disk(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1 << 40))
    assert make_plan(recipe(base, [], tmp_path / "out"), Execution()).walk.keep_bytes == 4 << 30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(4 << 30))
    imatrix = FEW | {"format": "gguf", "quant": "Q4_K_M", "options": {"imatrix": "auto"}}
    walk = make_plan(recipe(base, [], tmp_path / "out", **imatrix), Execution()).walk
    assert walk.keep_bytes == 1 << 30
    calibration = walk.tokens.calibration
    assert calibration is not None
    states = 7 << 29
    count = states // (4 * int(walk.model.config["hidden_size"]) * calibration.window)
    many = replace(walk, tokens=TokenSets(None, replace(calibration, ids=calibration.ids[:1] * count)))
    assert many.scratch_bytes == 3 * states
    check_memory(many.memory, many.lighter)
    in_memory = replace(many, keep_bytes=states)
    with pytest.raises(NotEnoughMemoryError, match="fewer tokens"):
        check_memory(in_memory.memory, in_memory.lighter)


@pytest.mark.parametrize(
    ("values", "option", "positions"),
    [
        ({"verify": True}, "--eval-window 512", 256),
        ({"verify": True, "evaluation": {"n_ctx": 257}}, "--eval-window 257", 256),
        ({"format": "gptq", "quant": "gptq-int4-g32"}, "--window 1024", 256),
        ({"format": "gguf", "quant": "Q4_K_M", "options": {"imatrix": "auto"}}, "--window 1024", 256),
    ],
)
def test_windows_longer_than_the_model_takes(
    base: Path, tmp_path: Path, values: dict[str, Any], option: str, positions: int
) -> None:
    caught = refused(RecipeError, tmp_path / "out", base, **values)
    assert caught.thing == option
    assert str(positions) in caught.expected
    assert str(positions) in caught.remedy


def test_windows_that_nothing_needs_may_be_of_any_length(base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"evaluation": {"n_ctx": 512}, "calibration": {"window": 512}}
    assert make_plan(recipe(base, [], tmp_path / "out", **values), Execution()).tokens == TokenSets(None, None)
    values["evaluation"] = {"n_ctx": 256}
    assert make_plan(recipe(base, [], tmp_path / "out", verify=True, **values), Execution()).tokens.evaluation


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 40960}, 40960),
        ({"max_position_embeddings": 40960, "rope_scaling": None}, 40960),
        ({"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 256),
        # Qwen2.5's cards give the number before scaling, Qwen3's the one that the model was trained with.
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        # transformers gives the scaled number.
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 256, "rope_parameters": {"full_attention": {"factor": 2}}}, 512),
        ({"max_position_embeddings": 256, "rope_scaling": {"factor": float("inf")}}, 256),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_positions_of_a_model(config: dict[str, Any], positions: int | None) -> None:
    assert positions_of(config) == positions


@pytest.mark.parametrize("key", ["Q8", "Q4_K_M", "fp16"])
def test_limit_of_a_type_that_is_not_made(base: Path, tmp_path: Path, key: str) -> None:
    # Left alone, the built-in limit would hold where the user believes that theirs does.
    evaluation = {"gate": {key: 0.5}}
    with pytest.raises(RecipeError, match=key):
        make_plan(recipe(base, [], tmp_path / "out", quant="bf16", verify=True, evaluation=evaluation), Execution())


def test_calibration_that_is_missing(base: Path, tmp_path: Path) -> None:
    text = {"text": tmp_path / "nothing.txt"}
    assert "nothing.txt" in refused(MissingFileError, tmp_path / "out", base, verify=True, calibration=text).thing


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_source_that_is_missing(base: Path, adapter: Path, tmp_path: Path, which: str) -> None:
    missing = tmp_path / "nothing"
    sources = (missing, adapter) if which == "base" else (base, missing)
    with pytest.raises(MissingFileError) as caught:
        export_to(tmp_path / "out", *sources)
    assert which in caught.value.thing
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"quant": "fp32", "options": {"max_shard_size": "100KB"}}, {"format": "gguf"}])
def test_plan_is_what_gets_written(base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = recipe(base, [adapter], tmp_path / "out", name="merged", **options)
    planned = describe(make_plan(wanted, Execution()))
    export(wanted)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    del written["export.json"], written["README.md"], written["report.html"]
    artifact = planned["outputs"][0]["artifacts"][0]
    assert {file["name"]: file["bytes"] for file in artifact["files"]} == written
    assert planned["disk_bytes"] == artifact["bytes"] == sum(written.values())
    assert sum(kind["share"] for kind in artifact["types"].values()) == pytest.approx(1, abs=1e-3)


def test_outputs_of_the_same_type_have_runtimes_of_their_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where vLLM is installed: it serves the plain one, and never the other.
    monkeypatch.setattr(plan_module, "choose_runtime", lambda runtimes, **_: runtimes[0])
    plain: dict[str, Any] = {"format": "gptq", "quant": "gptq-int4-g32", "out": tmp_path / "plain"}
    forced = {"desc_act": True, "force_unservable": True}
    outputs = [plain | {"out": tmp_path / "ordered", "options": forced}, plain]
    for order in (outputs, outputs[::-1]):
        plan = make_plan(Recipe.build({"base": str(base), "outputs": order} | FEW), Execution())
        assert len({artifact.label for artifact in plan.artifacts}) == 1
        verified_by = {
            Path(folder["out"]).name: folder["artifacts"][0]["verified_by"] for folder in describe(plan)["outputs"]
        }
        assert verified_by == {"plain": "vllm", "ordered": "transformers"}


# --- the reference pack ----------------------------------------------------------------------------------------------

UNASKED = {"n_ctx": 64, "tokens": 128, "answers": False}
KEPT: dict[str, Any] = {"verify": True, "keep_reference": True, "evaluation": UNASKED}


def test_kept_reference_counts_in_the_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = make_plan(recipe(base, [], tmp_path / "out", **(KEPT | {"keep_reference": False})), Execution())
    plan = make_plan(recipe(base, [], tmp_path / "out", **KEPT), Execution())
    assert plan.pack is not None
    assert plan.disk_bytes == without.disk_bytes + plan.pack.nbytes
    alone = UNASKED | {"max_tokens": 128}
    assert describe(plan)["reference"]["windows"] == {"first": 2, "most": 256}
    # Prompts are walked along for a pack alone, and in it.
    asking = make_plan(
        recipe(base, [], tmp_path / "out", **(KEPT | {"evaluation": UNASKED | {"answers": True}})), Execution()
    )
    assert asking.pack is not None
    prompted = 4 * asking.pack.hidden * sum(asking.pack.prompt_lengths)
    assert prompted > 0
    assert asking.walk.scratch_bytes == plan.walk.scratch_bytes + 2 * prompted
    assert asking.walk.memory >= plan.walk.memory + prompted
    assert asking.pack.nbytes > plan.pack.nbytes + 4 * sum(asking.pack.prompt_lengths)
    # With every window that may be drawn, whose states are held until the pack is written.
    first = make_plan(recipe(base, [], tmp_path / "out", **(KEPT | {"evaluation": alone})), Execution())
    assert first.pack is not None
    states = 254 * 31 * 4 * plan.pack.hidden
    assert plan.pack.files["hidden.safetensors"] - first.pack.files["hidden.safetensors"] == pytest.approx(
        states, abs=8
    )
    assert (first.walk_bytes, plan.walk_bytes) == (without.walk_bytes, without.walk_bytes + states)
    slack = 8 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, plan.disk_bytes + 2 * slack))
    make_plan(recipe(base, [], tmp_path / "out", **KEPT), Execution())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, plan.disk_bytes + 2 * slack - 1))
    with pytest.raises(NotEnoughDiskError):
        make_plan(recipe(base, [], tmp_path / "out", **KEPT), Execution())


def test_one_window_is_refused_where_no_more_can_be_drawn(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words of a text " * 500)
    one: dict[str, Any] = {"n_ctx": 64, "tokens": 64}
    values: dict[str, Any] = {"verify": True, "calibration": {"text": text}}
    make_plan(recipe(base, [], tmp_path / "out", **values, evaluation=one), Execution())
    wanted = values | {"evaluation": one | {"max_tokens": 127}}
    assert "at least 128 tokens" in refused(RecipeError, tmp_path / "out", base, **wanted).expected
    make_plan(recipe(base, [], tmp_path / "out", **(wanted | {"verify": False})), Execution())
    text.write_text("words of a text " * 10)
    assert "at least 128 tokens" in refused(RecipeError, tmp_path / "out", base, **values, evaluation=one).expected


def test_kept_reference_that_exists(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out.reference").mkdir()
    assert refused(OutputExistsError, tmp_path / "out", base, **KEPT).thing == str(tmp_path / "out.reference")
    assert make_plan(recipe(base, [], tmp_path / "out", force=True, **KEPT), Execution()).pack is not None


def test_kept_reference_that_overlaps_an_input(base: Path, tmp_path: Path) -> None:
    inside = base.rename(tmp_path / "out.reference")
    before = hashes(inside)
    with pytest.raises(OverlappingPathsError):
        make_plan(recipe(inside, [], tmp_path / "out", force=True, **KEPT), Execution())
    assert hashes(inside) == before


@pytest.mark.parametrize("other", ["out.reference", "out.reference/inner"])
def test_kept_reference_that_overlaps_another_output(base: Path, tmp_path: Path, other: str) -> None:
    outputs = [{"format": "safetensors", "out": tmp_path / name} for name in ("out", other)]
    with pytest.raises(OverlappingPathsError):
        make_plan(Recipe.build({"base": str(base), "outputs": outputs} | KEPT), Execution())


@pytest.mark.parametrize("values", [{"verify": False, "keep_reference": True}, {"reference_dtype": "bfloat16"}])
def test_reference_that_cannot_be_kept(base: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    assert "reference" in refused(RecipeError, tmp_path / "out", base, **values).thing
