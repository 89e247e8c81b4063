"""The command line: exit statuses, messages without tracebacks, what goes to which stream, and what is not imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from exporter.errors import RuntimeScoreError
from exporter.version import __version__
from tests.commands import invoke, run
from tests.folders import listing

Make = Callable[..., Path]
Arguments = list[str | Path]


@pytest.fixture
def inputs(make_base: Make, make_adapter: Make) -> Arguments:
    base = make_base()
    return ["--base", base, "--adapter", make_adapter(base)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands run in."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


GGUF_TYPES = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_0",
    "Q5_1",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "Q4_1",
]
GGUF_TYPES += ["Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS"]
GGUF_TYPES += ["Q2_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]

# --- help and the like -----------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "peft", "llama_cpp", "gguf", "numpy")
IMPORTS = """
import sys
from exporter.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
print("imported:", *[name for name in {names!r} if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["--version"], ["formats"]], ids=" ".join)
def test_answers_without_heavy_imports(arguments: list[str]) -> None:
    result = run(*arguments, program=IMPORTS.format(names=HEAVY))
    assert result.returncode == 0
    imported = result.stderr.splitlines()[-1].removeprefix("imported:").split()
    assert not set(imported) - ({"numpy", "gguf"} if arguments == ["formats"] else set())
    assert result.stdout


def test_plan_does_not_import_torch(inputs: Arguments, tmp_path: Path) -> None:
    arguments = [*inputs, "--format", "gguf", "--quant", "Q4_K_M", "--out", tmp_path / "out", "--json"]
    arguments += ["--eval-tokens", "512", "--eval-window", "256", "--calibration-tokens", "512", "--window", "256"]
    result = run("plan", *arguments, program=IMPORTS.format(names=HEAVY))
    assert result.returncode == 0, result.stderr
    assert not {"torch", "transformers", "peft"} & set(result.stderr.splitlines()[-1].split())
    assert json.loads(result.stdout)["outputs"][0]["artifacts"][0]["quant"] == "Q4_K_M"


def test_version() -> None:
    assert invoke("--version").stdout == f"exporter {__version__}\n"


def test_help_names_every_command() -> None:
    text = invoke("--help").stdout
    for command in ("export", "plan", "verify", "reference", "compare", "formats"):
        assert command in text
        assert invoke(command, "--help").exit_code == 0
    nothing = invoke()
    assert "export" in nothing.output
    assert "Traceback" not in nothing.output


def test_formats() -> None:
    listed = {entry["name"]: entry for entry in json.loads(invoke("formats", "--json").stdout)}
    assert listed["safetensors"]["quants"] == ["bf16", "fp16", "fp32"]
    assert sorted(listed["gguf"]["quants"]) == sorted(GGUF_TYPES)
    text = invoke("formats").stdout
    for entry in listed.values():
        assert entry["name"] in text
        assert " ".join(entry["quants"]) in text
        assert entry["needs"] in text


# --- what cannot be --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Arguments, str]] = {
    "no base": (["export", "--format", "gguf", "--out", "o"], "--base"),
    "no format": (["export", "--base", "b", "--out", "o"], "--format"),
    "no output": (["export", "--base", "b", "--format", "gguf"], "--out"),
    "base that is missing": (["export", "--base", "./b", "--format", "gguf", "--out", "o"], "./b"),
    "unknown flag": (["export", "--bse", "b"], "--bse"),
    "unknown command": (["exprot"], "exprot"),
    "unknown device": (["export", "--base", "b", "--format", "gguf", "--out", "o", "--device", "tpu"], "tpu"),
    "no threads": (["export", "--base", "b", "--format", "gguf", "--out", "o", "--threads", "0"], "threads"),
    "tokens that are none": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--eval-tokens", "x"], "tokens"),
    "too few tokens": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--eval-tokens", "3"], "tokens"),
    "window too small": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--eval-window", "3"], "n_ctx"),
    "calibration window too small": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--window", "3"],
        "calibration.window",
    ),
    "too few calibration tokens": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--calibration-tokens", "63"],
        "calibration.tokens",
    ),
    "seed that is none": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--seed", "x"], "--seed"),
    "limit that is none": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "Q8_0=big"], "--gate"),
    "limit that is NaN": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "nan"], "--gate"),
    "limit of a figure that has none": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "Q8_0:loss=1"],
        "--gate",
    ),
    "limit and limits of one type": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "Q8_0=1", "--gate", "Q8_0:kl=1"],
        "--gate",
    ),
    "share above one": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "Q8_0:same_top=2"],
        "same_top",
    ),
    "limit twice, in another case": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "Q8_0=0.1", "--gate", "q8_0=0.5"],
        "--gate",
    ),
    "limit twice, by name": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "Q8_0:kl=1", "--gate", "q8_0:kl=2"],
        "--gate",
    ),
    "limit below zero": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--gate", "-1"], "--gate"),
    "option that is none": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--option", "x"], "--option"),
    "name that is a path": (["plan", "--base", "b", "--format", "gguf", "--out", "o", "--name", "../x"], "name"),
    "a type twice": (
        ["plan", "--base", "b", "--format", "gguf", "--out", "o", "--quant", "F16", "--quant", "f16"],
        "F16",
    ),
    "recipe that is missing": (["export", "nothing.yaml"], "nothing.yaml"),
    "recipe and options": (["export", "recipe.yaml", "--base", "b"], "recipe.yaml"),
    "recipe and tokens": (["export", "recipe.yaml", "--eval-tokens", "512"], "recipe.yaml"),
    "recipe and window": (["plan", "recipe.yaml", "--window", "64"], "recipe.yaml"),
    "recipe and evaluation window": (["plan", "recipe.yaml", "--eval-window", "64"], "recipe.yaml"),
    "recipe and text": (["plan", "recipe.yaml", "--calibration", "text.txt"], "recipe.yaml"),
    "recipe and calibration tokens": (["export", "recipe.yaml", "--calibration-tokens", "512"], "recipe.yaml"),
    "recipe and a seed of zero": (["export", "recipe.yaml", "--seed", "0"], "recipe.yaml"),
    "recipe that is none": (["plan", "text.yaml"], "text.yaml"),
    "nothing to verify": (["verify", "nothing", "--base", "b"], "nothing"),
    "folder without a manifest": (["verify", ".", "--base", "b"], "export.json"),
    "verify with too few tokens": (["verify", ".", "--base", "b", "--eval-tokens", "3"], "tokens"),
    "verify with a small window": (["verify", ".", "--base", "b", "--eval-window", "3"], "n_ctx"),
    "verify with calibration tokens": (["verify", ".", "--base", "b", "--calibration-tokens", "64"], "tokens"),
    "verify without a base": (["verify", "."], "--base"),
    "verify with a base and a reference": (["verify", ".", "--reference", "r", "--base", "b"], "--base"),
    "verify with an adapter and a reference": (["verify", ".", "--reference", "r", "--adapter", "a"], "--adapter"),
    "verify with a text and a reference": (["verify", ".", "--reference", "r", "--calibration", "t"], "--calibration"),
    "verify with tokens and a reference": (["verify", ".", "--reference", "r", "--eval-tokens", "64"], "--eval-tokens"),
    "verify with a window and a reference": (
        ["verify", ".", "--reference", "r", "--eval-window", "64"],
        "--eval-window",
    ),
    "files only, without a base": (["verify", ".", "--files-only"], "--base"),
    "files only, and a reference": (["verify", ".", "--files-only", "--reference", "r"], "--reference"),
    "files only, and scores": (["verify", ".", "--files-only", "--base", "b", "--eval-tokens", "64"], "--eval-tokens"),
    "files only, and answers": (["verify", ".", "--files-only", "--base", "b", "--no-answers"], "--no-answers"),
    "reference without a base": (["reference", "--out", "o"], "--base"),
    "reference without an output": (["reference", "--base", "b"], "--out"),
    "reference of too few tokens": (["reference", "--base", "b", "--out", "o", "--eval-tokens", "3"], "tokens"),
    "reference in another dtype": (
        ["reference", "--base", "b", "--out", "o", "--reference-dtype", "float16"],
        "reference_dtype",
    ),
    "reference of a base that is missing": (["reference", "--base", "./b", "--out", "o"], "./b"),
    "recipe and a dtype of the reference": (["plan", "recipe.yaml", "--reference-dtype", "float32"], "recipe.yaml"),
    "kept reference without verification": (
        ["plan", "--base", "./b", "--format", "gguf", "--out", "o", "--keep-reference", "--no-verify"],
        "--no-verify",
    ),
    "dtype of a reference that is not kept": (
        ["plan", "--base", "./b", "--format", "gguf", "--out", "o", "--reference-dtype", "bfloat16"],
        "--reference-dtype",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_arguments_are_refused(workplace: Path, kind: str) -> None:
    (workplace / "recipe.yaml").write_text("base: ./b\noutputs: [{format: gguf, out: o}]\n")
    (workplace / "text.yaml").write_text("only text")
    before = listing(workplace)
    arguments, named = REFUSED[kind]
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert listing(workplace) == before


def test_refusal_says_what_was_found_and_what_to_do(workplace: Path, inputs: Arguments) -> None:
    result = invoke("export", *inputs, "--format", "safetensors", "--quant", "int4", "--out", "out")
    lines = [line.split(maxsplit=1) for line in result.stderr.splitlines()]
    assert [line[0] for line in lines] == ["refused", "found", "expected", "do"]
    assert all(len(line) == 2 for line in lines)


def test_names_that_look_like_markup_are_shown_as_they_are(workplace: Path) -> None:
    result = invoke("export", "--base", "./[red]base[/red]", "--format", "gguf", "--out", "o")
    assert result.exit_code == 2
    assert "./[red]base[/red]" in result.stderr
    result = invoke("export", "--base", "./[/]", "--format", "gguf", "--out", "o")
    assert result.exit_code == 2
    assert "./[/]" in result.stderr


def test_folder_whose_name_looks_like_markup(workplace: Path, make_base: Make) -> None:
    base, out = Path("[bold]base"), Path("[red]out")
    base.symlink_to(make_base(), target_is_directory=True)
    arguments: Arguments = ["--base", base, "--format", "gguf", "--quant", "Q8_0", "--out", out, "--no-verify"]
    arguments += ["--name", "merged"]
    assert "[red]out/merged-Q8_0.gguf" in invoke("plan", *arguments).stdout
    result = invoke("export", *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert f"published {out}" in result.stderr


@pytest.mark.parametrize(
    "option", [("--device", "tpu"), ("--device", "cuda:63"), ("--runtime", "nothing")], ids=" ".join
)
def test_verify_with_what_is_not_there(workplace: Path, inputs: Arguments, option: tuple[str, str]) -> None:
    assert invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify").exit_code == 0
    result = invoke("verify", "out", *inputs, "--eval-tokens", "64", "--eval-window", "64", *option)
    assert result.exit_code == 2, result.output
    assert option[1] in result.stderr


def test_verify_notices_a_changed_file(workplace: Path, inputs: Arguments) -> None:
    assert invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify").exit_code == 0
    scored = ("--eval-tokens", "128", "--eval-window", "64", "--max-eval-tokens", "128", "--gate", "1")
    assert invoke("verify", "out", *inputs, *scored).exit_code == 0
    file = workplace / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = invoke("verify", "out", *inputs, *scored)
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr


def test_device_that_is_not_there(workplace: Path, inputs: Arguments) -> None:
    arguments: Arguments = [*inputs, "--format", "safetensors", "--out", "out", "--no-verify", "--device", "cuda:63"]
    result = invoke("export", *arguments)
    assert result.exit_code == 2
    assert "cuda:63" in result.stderr
    assert listing(workplace) == set()


def test_failure_on_the_way_is_one(workplace: Path, inputs: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.pipeline import export as pipeline

    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError("the disk has gone")

    monkeypatch.setattr(pipeline, "finish_files", broken)
    result = invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify")
    assert result.exit_code == 1
    assert "the disk has gone" in result.stderr
    assert listing(workplace).isdisjoint({"out"})


def allocate_too_much() -> None:
    import torch

    torch.empty(1 << 60)


def fill_the_device() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1 GiB")


def fail_in_a_runtime() -> None:
    try:
        allocate_too_much()
    except RuntimeError as error:
        raise RuntimeScoreError("model", found=str(error), expected="scores", remedy="Report it.") from None


@pytest.mark.parametrize(
    ("fail", "found", "remedy"),
    [
        (allocate_too_much, "allocate 4611686018427387904 bytes", "--threads"),
        (fill_the_device, "Tried to allocate 2.00 GiB", "--device cpu"),
        (fail_in_a_runtime, "allocate 4611686018427387904 bytes", "--threads"),
    ],
)
def test_out_of_memory_on_the_way_is_no_traceback(
    workplace: Path,
    inputs: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], None],
    found: str,
    remedy: str,
) -> None:
    from exporter.pipeline import export as pipeline

    command = ("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "finish_files", lambda *_: fail())
        result = invoke(*command)
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "failed memory" in told
    assert found in told
    assert remedy in told
    # What the message says: it goes on.
    assert (workplace / ".out.staging").is_dir()
    assert invoke(*command).exit_code == 0


def test_other_errors_of_torch_are_defects(workplace: Path, inputs: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.pipeline import export as pipeline

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(pipeline, "finish_files", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify")


# --- what it prints --------------------------------------------------------------------------------------------------


def test_windows_longer_than_the_model_takes_are_refused(workplace: Path, inputs: Arguments) -> None:
    assert invoke("export", *inputs, "--format", "safetensors", "--no-verify", "--out", "out").exit_code == 0
    before = listing(workplace)
    for command in (["verify", "out"], ["reference", "--out", "pack"], ["plan", "--format", "gguf", "--out", "other"]):
        result = invoke(*command, *inputs, "--eval-window", "300")
        assert result.exit_code == 2
        assert "--eval-window 300" in result.output
        assert "256" in result.output
    assert listing(workplace) == before


def test_plan_writes_nothing(workplace: Path, inputs: Arguments) -> None:
    before = listing(workplace.parent)
    arguments: Arguments = [*inputs, "--format", "gguf", "--quant", "Q4_K_M", "--quant", "Q8_0", "--out", "deep/out"]
    arguments += ["--name", "merged", "--eval-tokens", "512", "--eval-window", "256"]
    arguments += ["--calibration-tokens", "512", "--window", "256"]
    planned = json.loads(invoke("plan", *arguments, "--json").stdout)
    shown = invoke("plan", *arguments).stdout
    assert listing(workplace.parent) == before
    artifacts = planned["outputs"][0]["artifacts"]
    assert [artifact["entry"] for artifact in artifacts] == ["merged-Q4_K_M.gguf", "merged-Q8_0.gguf"]
    for artifact in artifacts:
        assert artifact["entry"] in shown
        assert artifact["verified_by"] == "llamacpp"
        # Rows of 64 are no multiple of 256: the real types are shown, and counted.
        assert bool(artifact["fallbacks"]) is (artifact["quant"] == "Q4_K_M")
    assert planned["model"]["tensors_updated"] == 14
    assert planned["scratch_bytes"] > 0
    assert planned["disk_bytes"] == sum(artifact["bytes"] for artifact in artifacts) + planned["scratch_bytes"]
    assert planned["memory_bytes"]["merge"] > 0
    assert planned["memory_bytes"]["walk"] > 0
    assert planned["seconds"] > 0
    assert "note" in shown
    assert "Q5_0" in shown


def test_plan_of_a_recipe_file(workplace: Path, inputs: Arguments) -> None:
    outputs = [{"format": "safetensors", "out": "st"}, {"format": "gguf", "out": "gguf", "quant": "Q8_0"}]
    values = {"base": str(inputs[1]), "adapters": str(inputs[3]), "outputs": outputs, "verify": False}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(values))
    planned = json.loads(invoke("plan", "recipe.yaml", "--json").stdout)
    assert [Path(output["out"]).name for output in planned["outputs"]] == ["st", "gguf"]
    assert planned["memory_bytes"]["walk"] == 0
    assert listing(workplace) == {"recipe.yaml"}


def test_manifest_on_stdout(workplace: Path, inputs: Arguments) -> None:
    result = invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify", "--json")
    assert result.exit_code == 0
    manifest = json.loads(result.stdout)
    assert manifest == json.loads((workplace / "out" / "export.json").read_text())
    assert manifest["artifacts"][0]["verification"] == {"verdict": "skipped"}
    assert manifest["recipe"]["verify"] is False


def test_manifests_of_several_outputs_on_stdout(workplace: Path, inputs: Arguments) -> None:
    outputs = [{"format": "safetensors", "out": name, "quant": name} for name in ("bf16", "fp32")]
    values = {"base": str(inputs[1]), "adapters": str(inputs[3]), "outputs": outputs}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = invoke("export", "recipe.yaml", "--no-verify", "--json", "--quiet")
    manifests = json.loads(result.stdout)
    assert [manifest["recipe"]["quant"] for manifest in manifests] == [["bf16"], ["fp32"]]
    assert result.stderr == ""


def test_path_on_stdout_and_the_rest_on_stderr(workplace: Path, inputs: Arguments) -> None:
    result = invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify")
    assert result.stdout == "out\n"
    for part in ("merging on", "published", "not verified", "model.safetensors"):
        assert part in result.stderr
    # Plain when it is not a terminal.
    assert "\x1b" not in result.stderr
    quiet = invoke("export", *inputs, "--format", "safetensors", "--out", "out2", "--no-verify", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("out2\n", "")


def test_verdict_on_stderr(workplace: Path, inputs: Arguments) -> None:
    scored = ("--eval-tokens", "128", "--eval-window", "64", "--gate", "0.5")
    result = invoke("export", *inputs, "--format", "safetensors", "--out", "out", *scored)
    assert result.exit_code == 0
    for part in ("perplexity", "safetensors bf16", "passed", "published"):
        assert part in result.stderr


def test_shard_size_and_options(workplace: Path, inputs: Arguments) -> None:
    common: Arguments = [*inputs, "--format", "safetensors", "--no-verify"]
    assert invoke("export", *common, "--out", "a", "--max-shard-size", "100KB").exit_code == 0
    assert invoke("export", *common, "--out", "b", "--option", "max_shard_size=100KB").exit_code == 0
    assert "model.safetensors.index.json" in listing(workplace / "a")
    assert listing(workplace / "a") == listing(workplace / "b")
    gguf = invoke("plan", *inputs, "--format", "gguf", "--out", "c", "--max-shard-size", "100KB")
    assert gguf.exit_code == 2
    assert "max_shard_size" in gguf.stderr


def test_base_alone(workplace: Path, inputs: Arguments) -> None:
    result = invoke("export", *inputs[:2], "--format", "safetensors", "--out", "out", "--no-verify", "--json")
    assert result.exit_code == 0
    manifest = json.loads(result.stdout)
    assert manifest["merge"]["tensors_updated"] == 0
    assert [entry["role"] for entry in manifest["inputs"]] == ["base"]


def test_reference_pack_from_one_command_to_the_next(workplace: Path, inputs: Arguments) -> None:
    scored = ("--eval-tokens", "128", "--eval-window", "64")
    made = invoke("reference", *inputs, *scored, "--out", "kept", "--device", "cpu", "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout) == json.loads((workplace / "kept" / "reference.json").read_text())
    assert "walking reference" in made.stderr
    assert "Traceback" not in made.stderr
    again = invoke("reference", *inputs, *scored, "--out", "kept")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    replaced = invoke("reference", *inputs, *scored, "--out", "kept", "--force", "--quiet")
    assert (replaced.exit_code, replaced.stdout, replaced.stderr) == (0, "kept\n", "")
    assert invoke("export", *inputs, "--format", "safetensors", "--out", "out", "--no-verify").exit_code == 0
    result = invoke("verify", "out", "--reference", "kept", "--gate", "1", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["safetensors bf16"]
    assert (found["verdict"], found["by_reference"]) == ("passed", True)
    assert found["weights"]["survival"] > 0.9
    assert [one["followed"] for one in found["answers"]["continuations"]] == [1, 1, 1, 1]
    assert result.stderr.splitlines()[-1].startswith("held against a reference pack: of the weights")
    unasked = invoke("verify", "out", "--reference", "kept", "--gate", "1", "--json", "--no-answers")
    assert json.loads(unasked.stdout)["safetensors bf16"]["answers"] is None
    more = invoke("reference", *inputs, *scored, "--max-eval-tokens", "256", "--out", "more", "--json", "--no-answers")
    assert [json.loads(more.stdout)["evaluation"][name] for name in ("windows", "first")] == [4, 2]
    whole = invoke("verify", "out", *inputs[:4], *scored, "--gate", "1", "--no-answers")
    assert whole.exit_code == 0, whole.stderr
    assert "reference pack" not in whole.stderr
    assert invoke("verify", "out", "--reference", "kept", "--gate", "0").exit_code == 3
    assert invoke("verify", "out", "--reference", "out").exit_code == 2


def test_recipe_file_and_a_kept_reference(workplace: Path, inputs: Arguments) -> None:
    outputs = [{"format": "safetensors", "out": name, "quant": name} for name in ("bf16", "fp32")]
    evaluation = {"tokens": 128, "max_tokens": 128, "n_ctx": 64, "gate": {"*": 1.0}}
    values = {"base": str(inputs[1]), "adapters": str(inputs[3]), "outputs": outputs, "evaluation": evaluation}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(values))
    planned = json.loads(invoke("plan", "recipe.yaml", "--keep-reference", "--json").stdout)["reference"]
    assert "bf16.reference" in invoke("plan", "recipe.yaml", "--keep-reference").stdout
    assert planned["windows"] == {"first": 2, "most": 2}
    drawn = ("--keep-reference", "--eval-tokens", "128", "--eval-window", "64", "--max-eval-tokens", "512")
    few = ("--calibration-tokens", "512", "--window", "64")
    shown = invoke("plan", *inputs, "--format", "gguf", "--out", "other", *few, *drawn).stdout
    assert "with 6 windows that may be drawn" in shown
    result = invoke("export", "recipe.yaml", "--keep-reference")
    assert result.exit_code == 0, result.stderr
    assert f"reference {planned['out']}" in result.stderr
    assert {path.name for path in workplace.iterdir()} == {"recipe.yaml", "bf16", "fp32", "bf16.reference"}
    pack = Path(planned["out"])
    written = {str(path.relative_to(pack)): path.stat().st_size for path in pack.rglob("*") if path.is_file()}
    del written["reference.json"]
    assert {file["name"]: file["bytes"] for file in planned["files"]} == written
    assert planned["bytes"] == sum(written.values())


def test_verify_of_files_alone(workplace: Path, inputs: Arguments) -> None:
    quants = ("--quant", "Q8_0", "--quant", "F16")
    assert invoke("export", *inputs, "--format", "gguf", *quants, "--out", "out", "--no-verify").exit_code == 0
    result = invoke("verify", "out", *inputs, "--files-only", "--json")
    assert result.exit_code == 0, result.stderr
    assert {label: found["broken"] for label, found in json.loads(result.stdout).items()} == {
        "gguf Q8_0": [],
        "gguf F16": [],
    }
    assert "nothing was scored" in result.stderr
    result = invoke("verify", "out", *inputs[:2], "--files-only")
    assert result.exit_code == 3
    assert "of the adapter's whole change" in result.stderr or "% off" in result.stderr
