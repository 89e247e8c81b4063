"""The reference pack: what is in it, artifacts judged with it as with base and adapter, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import ArtifactError, RecipeError, ReferencePackError
from exporter.plan.reference_pack import NAMES, NEEDED, TOKENS_FILE
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration, Evaluation
from exporter.reference.pack import writer as packing
from exporter.verify.published.verify import PublishedResult, verify_published, verify_with_pack
from tests.commands import run
from tests.exports import export_to, pack_to
from tests.folders import DELETED, copy, edit_json, hashes, listing, rehash
from tests.merged import load_peft

ROOT = Path(__file__).resolve().parents[3]
# A short text, so that tokenizing it takes no time: this file.
TEXT = Calibration(text=Path(__file__))
EVALUATION = Evaluation(tokens=128, n_ctx=64)
FILES = ("head.safetensors", "hidden.safetensors", "prompts.safetensors", "sketches.safetensors", "tokens.safetensors")

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def inputs(make_base: Make, make_adapter: Make) -> tuple[Path, Path]:
    base = make_base("qwen2")
    return base, make_adapter(base)


def write(out: Path, base: Path, *adapters: Path, threads: int | None = None, **values: Any) -> Path:
    """A pack by itself."""
    settings = {
        "name": "model",
        "calibration": TEXT.model_dump(),
        "evaluation": EVALUATION.model_dump(exclude_unset=True),
    }
    return pack_to(out, base, *adapters, threads=threads, **(settings | values))


def export_with_pack(out: Path, base: Path, *adapters: Path, **values: Any) -> bool:
    """An export that keeps the reference; returns whether it passed."""
    settings: dict[str, Any] = {"verify": True, "keep_reference": True, "name": "model", "format": "gguf"}
    settings |= {
        "quant": ("F32", "F16"),
        "calibration": TEXT.model_dump(),
        "evaluation": EVALUATION.model_dump(exclude_unset=True),
    }
    return export_to(out, base, *adapters, **(settings | values)).passed


@pytest.fixture(scope="session")
def published(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder; the pack lies beside it. Base and adapter were removed since."""
    parent = tmp_path_factory.mktemp("published")
    base, adapter = copy(inputs[0], parent / "base"), copy(inputs[1], parent / "adapter")
    assert export_with_pack(parent / "out", base, adapter)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    return parent / "out"


@pytest.fixture(scope="session")
def pack(published: Path) -> Path:
    return published.with_name("out.reference")


@pytest.fixture(scope="session")
def rounded(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with states in bfloat16."""
    return write(tmp_path_factory.mktemp("rounded") / "pack", *inputs, reference_dtype="bfloat16")


def judge(folder: Path, pack: Path, runtime: str | None = None) -> PublishedResult:
    return verify_with_pack(folder, pack, {}, runtime, "cpu", Reporter())


def description(pack: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((pack / "reference.json").read_text(encoding="utf-8"))
    return loaded


def tensors(pack: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pack, by safetensors' own loader."""
    return {name: value for file in FILES for name, value in load_file(pack / file).items()}


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "config", "head"),
    [
        ("qwen2", {"dtype": "bfloat16"}, {}, torch.bfloat16),
        ("qwen3", {"tied": False}, {"target_modules": ["q_proj", "lm_head"]}, torch.float32),
    ],
    ids=["tied", "adapted head"],
)
def test_it_says_what_peft_says(
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
    config: dict[str, Any],
    head: torch.dtype,
) -> None:
    base = make_base(family, **options)
    adapter = make_adapter(base, **config)
    folder = write(tmp_path / "pack", base, adapter)
    stored, said = tensors(folder), description(folder)
    assert (said["vocabulary"], said["hidden_size"]) == tuple(stored["head"].shape)
    assert stored["head"].dtype == head
    first = said["evaluation"]["first_scored"]
    assert stored["ids"].shape == (2, 64)
    assert stored["hidden"].shape == (2, 63 - first, said["hidden_size"])
    with torch.no_grad():
        logits = load_peft(base, adapter)(input_ids=stored["ids"].long()).logits[:, first:-1]
    again = stored["hidden"] @ stored["head"].float().T
    assert (again - logits).abs().max() < 1e-4
    right = torch.log_softmax(logits, dim=-1).gather(2, stored["ids"].long()[:, first + 1 :, None])[..., 0]
    assert (stored["log_probabilities"] - right).abs().max() < 1e-5
    assert (stored["top_tokens"] == logits.argmax(dim=-1)).float().mean() > 0.99
    assert said["perplexity"] == pytest.approx(float((-stored["log_probabilities"]).mean().exp()), rel=1e-12)
    assert said["evaluation"]["tokens_scored"] == right.numel()
    raw = stored["ids"].to(torch.int32).numpy().tobytes()
    assert said["evaluation"]["sha256"] == hashlib.sha256(raw).hexdigest()


def test_export_and_reference_write_the_same_bytes(inputs: tuple[Path, Path], pack: Path, tmp_path: Path) -> None:
    base, adapter = copy(inputs[0], tmp_path / "base"), copy(inputs[1], tmp_path / "adapter")
    for threads in (1, 3):
        assert hashes(write(tmp_path / f"by {threads}", base, adapter, threads=threads)) == hashes(pack)


def test_it_names_its_files_and_nothing_of_this_machine(pack: Path, inputs: tuple[Path, Path]) -> None:
    said, found = description(pack), hashes(pack)
    del found["reference.json"]
    assert {name: entry["sha256"] for name, entry in said["files"].items()} == found
    assert all((pack / name).stat().st_size == entry["bytes"] for name, entry in said["files"].items())
    for role, folder in zip(said["inputs"], inputs, strict=True):
        known = hashes(folder)
        assert {file["name"]: file["sha256"] for file in role["files"]}.items() <= known.items()
    text = (pack / "reference.json").read_text(encoding="utf-8")
    assert "/" not in text.replace('"model/', "")


def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "docs" / "reference.schema.json").read_text(encoding="utf-8"))
    return loaded


def test_schema_describes_it(pack: Path, rounded: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    for folder in (pack, rounded):
        jsonschema.Draft202012Validator(schema()).validate(description(folder))


@pytest.mark.parametrize("path", [(), ("evaluation",), ("states",), ("states", "loss"), ("head",), ("files",)])
def test_schema_knows_every_field(pack: Path, path: tuple[str, ...]) -> None:
    said = description(pack)
    place = said
    for key in path:
        place = place[key]
    # Not every model has every file of a tokenizer.
    sometimes = {f"model/{name}" for name in NAMES} - {f"model/{name}" for name in NEEDED}
    for key in place.keys() - sometimes:
        kept = place.pop(key)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema()).validate(said)
        place[key] = kept
    place["time"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(said)


def test_schema_describes_inputs_as_the_one_of_the_manifest() -> None:
    ours = schema()["$defs"]
    manifest = json.loads((ROOT / "docs" / "export.schema.json").read_text(encoding="utf-8"))["$defs"]
    shared = ours.keys() & manifest.keys() - {"evaluation"}
    assert {"base", "adapter", "input_files"} <= shared
    assert {name: ours[name] for name in shared} == {name: manifest[name] for name in shared}


# --- states in bfloat16 ----------------------------------------------------------------------------------------------


def test_loss_of_rounding_is_measured(pack: Path, rounded: Path) -> None:
    exact, stored, said = tensors(pack), tensors(rounded), description(rounded)
    assert stored["hidden"].dtype == torch.bfloat16
    assert torch.equal(stored["hidden"], exact["hidden"].bfloat16())
    assert torch.equal(stored["log_probabilities"], exact["log_probabilities"])
    head = exact["head"].double()
    p = torch.log_softmax(exact["hidden"].double() @ head.T, dim=-1)
    q = torch.log_softmax(stored["hidden"].double() @ head.T, dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1)
    targets = exact["ids"].long()[:, said["evaluation"]["first_scored"] + 1 :, None]
    loss = said["states"]["loss"]
    assert loss["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-2)
    assert loss["kl_largest"] == pytest.approx(float(kl.max()), rel=1e-2)
    assert loss["delta_log"] == pytest.approx(float((p - q).gather(2, targets).mean()), abs=1e-6)
    assert loss["kl_mean"] > 0
    assert description(pack)["states"] == {
        "dtype": "float32", "loss": {"kl_mean": 0.0, "kl_largest": 0.0, "delta_log": 0.0},
    }  # fmt: skip


def test_states_that_would_lose_too_much_stay_in_float32(
    inputs: tuple[Path, Path], pack: Path, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = description(rounded)["states"]["loss"]
    monkeypatch.setattr(packing, "MAX_STATE_LOSS", loss["kl_mean"] * 0.99)
    kept = write(tmp_path / "pack", *inputs, reference_dtype="bfloat16")
    assert description(kept)["states"] == {"dtype": "float32", "wanted": "bfloat16", "loss": loss}
    jsonschema.Draft202012Validator(schema()).validate(description(kept))
    assert {name: hashes(kept)[name] for name in FILES} == {name: hashes(pack)[name] for name in FILES}


# --- judging with it -------------------------------------------------------------------------------------------------


def test_figures_are_those_of_base_and_adapter(published: Path, pack: Path, inputs: tuple[Path, Path]) -> None:
    before = hashes(published), hashes(pack)
    found = judge(published, pack)
    assert found.passed
    by_base = verify_published(
        published, str(inputs[0]), (str(inputs[1]),), TEXT, EVALUATION, None, "cpu", Reporter()
    )  # fmt: skip
    # Of weights a pack knows a sketch, and of an answer the first token.
    by_model, by_pack = by_base.as_json(), found.as_json()
    for label, figures in by_model.items():
        assert (figures.pop("by_reference"), by_pack[label].pop("by_reference")) == (False, True)
        exact, estimated = figures.pop("weights"), by_pack[label].pop("weights")
        assert estimated["relative_error"] == pytest.approx(exact["relative_error"], rel=0.1)
        assert estimated["survival"] == pytest.approx(exact["survival"], abs=0.01)
        assert estimated["layers"].keys() == exact["layers"].keys()
        followed = [one["answers"].pop("continuations") for one in (figures, by_pack[label])]
        for whole, first in zip(*followed, strict=True):
            assert first["followed"] == 1
            assert whole["followed"] == whole["tokens"] == first["tokens"] > 1
            assert (first["prompt"], first["loop"]) == (whole["prompt"], whole["loop"])
    assert by_pack == by_model
    assert found.sizes == by_base.sizes
    assert (hashes(published), hashes(pack)) == before


def test_states_in_bfloat16_change_the_divergence_by_their_loss(published: Path, pack: Path, rounded: Path) -> None:
    exact, found = judge(published, pack).as_json(), judge(published, rounded).as_json()
    loss = description(rounded)["states"]["loss"]["kl_mean"]
    for label in exact:
        by_exact, by_rounded = exact[label].pop("kl_divergence"), found[label].pop("kl_divergence")
        # Triangle inequality of the square roots, with room for what is not quite a distance.
        assert abs(by_rounded["mean"] ** 0.5 - max(by_exact["mean"], 0) ** 0.5) < 1.5 * loss**0.5
        assert by_rounded["mean"] != by_exact["mean"]
        assert exact[label].pop("jensen_shannon")["mean"] != found[label].pop("jensen_shannon")["mean"]
        for one in (exact[label], found[label]):
            one["checks"] = [check for check in one["checks"] if check["name"] != "kl_divergence"]
        for part in ("kl_quantiles", "kl_along_window"):
            assert exact[label]["profile"].pop(part) != found[label]["profile"].pop(part)
    assert found == exact


def test_a_model_folder_is_judged_too(inputs: tuple[Path, Path], pack: Path, tmp_path: Path) -> None:
    export_to(tmp_path / "out", *inputs, quant="fp32", name="other")
    found = judge(tmp_path / "out", pack).verdicts["safetensors fp32"]
    assert found.passed
    assert found.comparison is not None
    assert found.comparison.reference_perplexity == pytest.approx(description(pack)["perplexity"], rel=1e-12)


def test_limits_may_be_given(published: Path, pack: Path) -> None:
    found = verify_with_pack(published, pack, {"F16": 0.0}, None, "cpu", Reporter())
    assert [verdict.passed for verdict in found.verdicts.values()] == [True, False]


def test_the_size_of_the_model_is_the_manifests(published: Path, pack: Path, tmp_path: Path) -> None:
    folder = copy(published, tmp_path / "out")
    assert {one.gate.size_class for one in judge(folder, pack).verdicts.values()} == {"below_1b"}
    manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    manifest["merge"]["parameters"] = 1_000_000_000
    (folder / "export.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert {one.gate.size_class for one in judge(folder, pack).verdicts.values()} == {"from_1b"}


def test_it_is_kept_when_the_gate_fails(inputs: tuple[Path, Path], pack: Path, tmp_path: Path) -> None:
    strict = EVALUATION.model_dump(exclude_unset=True) | {"gate": {"*": 0.0}, "max_tokens": EVALUATION.tokens}
    assert not export_with_pack(tmp_path / "out", *inputs, quant="F16", evaluation=strict)
    assert {path.name for path in tmp_path.iterdir()} == {"out.rejected", "out.reference"}
    assert hashes(tmp_path / "out.reference") == hashes(pack)
    found = judge(tmp_path / "out.rejected", pack).verdicts["gguf F16"].comparison
    assert found is not None
    assert found.delta != 0


def test_what_was_drawn_for_a_verdict_is_in_it_and_decides_again(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base("qwen2", hidden=256, intermediate=512, head_dim=64)
    inputs = base, make_adapter(base)
    # The upper end of the interval is 0.0092 over two windows and 0.0050 over four.
    gate = {"*": {"kl": 0.006, "change": 1.0, "same_top": 0.0}}
    evaluation = EVALUATION.model_dump(exclude_unset=True) | {"gate": gate, "answers": False}
    assert export_with_pack(tmp_path / "out", *inputs, quant=("Q4_0", "F16"), evaluation=evaluation)
    exported = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    before = {artifact["quant"]: artifact["verification"] for artifact in exported["artifacts"]}
    assert [one["looks"] for one in before.values()] == [[62, 124], [62]]

    kept = tmp_path / "out.reference"
    limits = Evaluation.model_validate(evaluation).gate
    found = verify_with_pack(tmp_path / "out", kept, limits, None, "cpu", Reporter())
    assert found.passed
    # It looks as often as the export did.
    assert [verdict.looks for verdict in found.verdicts.values()] == [(62, 124), (62,)]
    assert found.evaluation is not None
    assert found.evaluation["drawn"]["windows"] == 2
    again = found.as_json()["gguf Q4_0"]
    for name in ("perplexity", "delta", "same_top"):
        assert again[name] == pytest.approx(before["Q4_0"][name], rel=1e-6)
    for name in ("mean", "interval"):
        assert again["kl_divergence"][name] == pytest.approx(before["Q4_0"]["kl_divergence"][name], rel=1e-4)
    alone = write(tmp_path / "alone", *inputs)
    verdict = verify_with_pack(tmp_path / "out", alone, limits, None, "cpu", Reporter()).verdicts["gguf Q4_0"]
    assert verdict.verdict == "undecided"

    # The drawn windows are the text's next ones here, so one that scores as many from the beginning says the same.
    most = EVALUATION.model_dump(exclude_unset=True) | {"max_tokens": 256}
    longer = write(tmp_path / "longer", *inputs, evaluation=most)
    assert description(kept)["evaluation"] == description(longer)["evaluation"]
    assert description(kept)["perplexity"] == pytest.approx(description(longer)["perplexity"], rel=1e-6)
    ours, theirs = tensors(kept), tensors(longer)
    assert torch.equal(ours["ids"], theirs["ids"])
    for name in ("hidden", "log_probabilities"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    jsonschema.Draft202012Validator(schema()).validate(description(kept))


# --- a pack that does not belong -------------------------------------------------------------------------------------


def refused(folder: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> ReferencePackError:
    """Judge, and check that the pack is refused before anything is scored."""

    def score(*_: object) -> None:
        raise AssertionError("scored with a pack that does not belong or was damaged")

    monkeypatch.setattr("exporter.verify.candidates.score_in", score)
    with pytest.raises(ReferencePackError) as caught:
        judge(folder, pack)
    assert isinstance(caught.value, ArtifactError)
    assert caught.value.exit_status == 2
    return caught.value


@pytest.mark.parametrize(
    ("other", "thing"),
    [
        ("base", "base model.safetensors"),
        ("vocabulary", "base config.json"),
        ("adapter", "adapter adapter_model.safetensors"),
        ("no adapter", "adapter adapter_model.safetensors"),
        ("two adapters", "adapter.1 adapter_config.json"),
        ("tokenizer", "base tokenizer.json"),
    ],
)
def test_pack_of_something_else_is_refused(
    published: Path,
    inputs: tuple[Path, Path],
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: str,
    thing: str,
) -> None:
    base, adapter = inputs
    made_from: tuple[Path, ...] = (base, adapter)
    if other == "base":
        made_from = (make_base("qwen2", seed=5), adapter)
    elif other == "vocabulary":
        larger = make_base("qwen2", padding=32)
        made_from = (larger, make_adapter(larger))
    elif other == "adapter":
        made_from = (base, make_adapter(base, seed=7))
    elif other == "no adapter":
        made_from = (base,)
    elif other == "two adapters":
        made_from = (base, adapter, make_adapter(base, seed=7))
    else:
        changed = copy(base, tmp_path / "base")
        (changed / "tokenizer.json").write_text((changed / "tokenizer.json").read_text() + "\n")
        made_from = (changed, adapter)
    error = refused(published, write(tmp_path / "pack", *made_from), monkeypatch)
    assert error.thing == thing
    assert error.found != error.expected


def test_artifact_that_does_not_say_what_it_was_made_from_is_refused(
    published: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(published, tmp_path / "out")
    edit_json(folder / "export.json", inputs=DELETED)
    assert "inputs" in refused(folder, pack, monkeypatch).thing


# --- a pack that was damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "model/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_file_is_refused(
    published: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    folder = copy(pack, tmp_path / "pack")
    file = folder / name
    raw = bytearray(file.read_bytes())
    if damage == "flipped":
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "cut":
        file.write_bytes(raw[:-8])
    else:
        file.unlink()
    assert refused(published, folder, monkeypatch).thing == name


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"{}"], ids=["empty", "half", "bytes", "list", "{}"]
)
def test_what_is_not_a_description_is_refused(
    published: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    folder = copy(pack, tmp_path / "pack")
    (folder / "reference.json").write_bytes(content)
    assert "reference.json" in refused(published, folder, monkeypatch).thing


def test_truncated_description_and_no_folder_at_all_are_refused(
    published: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(pack, tmp_path / "pack")
    raw = (folder / "reference.json").read_bytes()
    (folder / "reference.json").write_bytes(raw[: len(raw) // 2])
    assert "reference.json" in refused(published, folder, monkeypatch).thing
    assert "reference.json" in refused(published, tmp_path / "nothing", monkeypatch).thing


@pytest.mark.parametrize(
    ("changes", "thing"),
    [
        ({"schema_version": 1}, "reference.json"),
        ({"vocabulary": 10}, "head.safetensors: head"),
        ({"hidden_size": 32}, "hidden.safetensors: hidden"),
        ({"states": {"dtype": "bfloat16"}}, "hidden.safetensors: hidden"),
        ({"prompts": {"short": 1}}, "prompts.safetensors: prompt_ids"),
        ({"files": {}}, "reference.json"),
    ],
    ids=["version", "vocabulary", "hidden", "dtype", "prompts", "files"],
)
def test_description_that_does_not_fit_the_files_is_refused(
    published: Path,
    pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    thing: str,
) -> None:
    folder = copy(pack, tmp_path / "pack")
    edit_json(folder / "reference.json", **changes)
    assert refused(published, folder, monkeypatch).thing.endswith(thing)


@pytest.mark.parametrize("name", ["ids", "log_probabilities"])
def test_tokens_that_are_not_those_described_are_refused(
    published: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # The hashes are right: someone wrote the pack so.
    folder = copy(pack, tmp_path / "pack")
    values = load_file(folder / TOKENS_FILE)
    values[name][0, 0] = 3 if name == "ids" and values["ids"][0, 0] != 3 else np.nan if name != "ids" else 4
    save_file(values, folder / TOKENS_FILE)
    rehash(folder / "reference.json", TOKENS_FILE)
    assert refused(published, folder, monkeypatch).thing == f"{TOKENS_FILE}: {name}"


@pytest.mark.parametrize(("characters", "tokens"), [(None, 64), (160, 1024)], ids=["asked for one", "short text"])
def test_a_pack_of_one_window_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path, characters: int | None, tokens: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8")[:characters])
    settings: dict[str, Any] = {"calibration": {"text": text}, "evaluation": {"tokens": tokens, "n_ctx": 64}}
    with pytest.raises(RecipeError, match="at least 128") as caught:
        write(tmp_path / "pack", *inputs, **settings)
    assert caught.value.exit_status == 2
    assert listing(tmp_path) == {"text.txt"}


# --- writing it ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from exporter.reference.pack import writer as packing
write = packing._write
def killed(file, parts):
    if file.name == "hidden.safetensors":
        file.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, parts)
packing._write = killed
from exporter.cli.app import app
app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "reference"])
def test_killed_run_leaves_nothing_that_looks_finished(
    inputs: tuple[Path, Path], pack: Path, tmp_path: Path, command: str
) -> None:
    arguments: list[str | Path] = ["--base", inputs[0], "--adapter", inputs[1], "--name", "model", "--device", "cpu"]
    arguments += ["--calibration", __file__, "--eval-tokens", "128", "--eval-window", "64"]
    if command == "export":
        arguments += ["--format", "gguf", "--quant", "F32", "--keep-reference", "--out", tmp_path / "out"]
        kept, finished = tmp_path / "out.reference", {"out", "out.reference"}
    else:
        arguments += ["--out", tmp_path / "kept"]
        kept, finished = tmp_path / "kept", {"kept"}
    result = run(command, *arguments, program=KILLED)
    assert result.returncode == -9, result.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".{name}.staging" for name in finished}
    assert run(command, *arguments).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == finished
    assert hashes(kept) == hashes(pack)


def test_base_that_is_not_finite_leaves_nothing(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    from exporter.errors import NonFiniteTensorError

    base = copy(inputs[0], tmp_path / "base")
    values = load_file(base / "model.safetensors")
    values["model.norm.weight"][0] = torch.nan
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    before = listing(tmp_path)
    with pytest.raises(NonFiniteTensorError):
        write(tmp_path / "pack", base, inputs[1])
    assert listing(tmp_path) == before
