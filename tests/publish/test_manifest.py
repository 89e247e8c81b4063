"""`export.json`: it validates, its hashes are right, it says nothing of this machine, and it is what was written."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from exporter import Execution, export
from exporter.artifact.file_records import MANIFEST_NAME
from exporter.plan.gate_limits import FALLBACK_GATE
from exporter.publish.model_card import CARD_NAME
from exporter.publish.report.html import REPORT_NAME
from exporter.runtimes.base import TokenScores
from exporter.verify.gate import judge
from exporter.verify.results_json import verification_json
from exporter.verify.scores.metrics import Divergences, compare
from tests.exports import export_to, recipe
from tests.folders import copy, edit_json, unpack
from tests.merged import tensor_types

ROOT = Path(__file__).resolve().parents[2]
TEXT: dict[str, Any] = {"text": Path(__file__), "tokens": 128, "window": 64}
EVALUATION: dict[str, Any] = {"tokens": 128, "n_ctx": 64, "gate": {"*": 100.0}}


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "docs" / "export.schema.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="session")
def inputs(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A sharded base with a model card, and two adapters, the second with a tokenizer of its own."""
    parent = tmp_path_factory.mktemp("inputs")
    base = copy(make_base("qwen3", hidden=96, heads=6, max_shard_size="100KB"), parent / "small-base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    one = copy(make_adapter(base, target_modules=["q_proj", "lm_head"]), parent / "first-lora")
    two = copy(make_adapter(base, seed=2, r=8, use_rslora=True), parent / "second-lora")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (two / name).write_bytes((base / name).read_bytes())
    edit_json(two / "tokenizer_config.json", pad_token="<|im_end|>")
    return base, one, two


@pytest.fixture(scope="session")
def folders(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published folders: each format verified, unverified, and rejected."""
    parent = tmp_path_factory.mktemp("folders")
    base, one, two = inputs
    verified: dict[str, Any] = {"verify": True, "calibration": TEXT, "evaluation": EVALUATION, "name": "model"}
    export_to(parent / "gguf", base, one, two, format="gguf", quant=("Q4_K_M", "F16"), **verified)
    export_to(parent / "hf", base, one, two, quant=("fp32",), **verified)
    export_to(parent / "gguf-unverified", base, format="gguf", quant=("Q8_0",))
    export_to(parent / "hf-unverified", base, one, options={"max_shard_size": "100KB"})
    strict = verified | {"evaluation": EVALUATION | {"gate": {"Q2_K": {"kl": 0.0}}}}
    export_to(parent / "gguf-failed", base, one, format="gguf", quant=("Q2_K",), **strict)
    names = ("gguf", "hf", "gguf-unverified", "hf-unverified")
    return {name: parent / name for name in names} | {"gguf-failed": parent / "gguf-failed.rejected"}


NAMES = ("gguf", "hf", "gguf-unverified", "hf-unverified", "gguf-failed")


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read(folder: Path) -> dict[str, Any]:
    text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text, parse_constant=_no_constant)
    return manifest


# --- the schema ----------------------------------------------------------------------------------------------------


def test_the_schema_is_one(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


def _objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every subschema that describes properties, with where it is."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            yield path, schema
        for key, value in schema.items():
            yield from _objects(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from _objects(value, f"{path}/{index}")


def test_every_field_is_described_and_no_other_is_allowed(schema: dict[str, Any]) -> None:
    objects = dict(_objects(schema))
    assert len(objects) > 10
    for path, subschema in objects.items():
        assert subschema.get("additionalProperties") is False, path
        for name, field in subschema["properties"].items():
            target = schema["$defs"][field["$ref"].rsplit("/", 1)[1]] if "$ref" in field else field
            assert field.get("description") or target.get("description"), f"{path}: {name}"


@pytest.mark.parametrize("name", NAMES)
def test_manifests_validate(schema: dict[str, Any], folders: dict[str, Path], name: str) -> None:
    jsonschema.Draft202012Validator(schema).validate(read(folders[name]))


def _without(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path
        place: Any = manifest
        for key in parents:
            place = place[key]
        del place[last]

    return change


def _with(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path
        place: Any = manifest
        for key in parents:
            place = place[key]
        place[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("files"),
        _without("artifacts", 0, "verification", "delta_stderr"),
        _without("artifacts", 0, "verification", "runtime"),
        _with([0.1], "artifacts", 0, "verification", "delta_interval"),
        _without("artifacts", 0, "verification", "profile"),
        _with([[0.5, -1.0]], "artifacts", 0, "verification", "profile", "kl_quantiles"),
        _with([[0, 0.1, 0.2]], "artifacts", 0, "verification", "profile", "kl_along_window"),
        _with([[1]], "artifacts", 0, "verification", "profile", "probability"),
        _without("artifacts", 0, "verification", "jensen_shannon", "p95"),
        _with(20, "artifacts", 0, "verification", "kl_divergence", "k"),
        _with({"value": 2.0, "stderr": None}, "artifacts", 0, "verification", "probability_rms"),
        _without("inputs", 0, "files", 0, "sha256"),
        _with("2026-01-01", "time"),
        _with("host", "merge", "host"),
        _with({"verdict": "skipped", "perplexity": 3.0}, "artifacts", 0, "verification"),
        _with({"verdict": "skipped"}, "artifacts", 0, "verification"),
        _with(["a limit"], "artifacts", 0, "verification", "broken"),
        _with("maybe", "artifacts", 0, "verification", "verdict"),
        _with(1.5, "artifacts", 0, "verification", "same_top"),
        _with("/somewhere/model.gguf", "artifacts", 0, "entry"),
        _with({"bytes": 1, "sha256": "0" * 64}, "files", "../outside"),
        _with("/home/someone/base", "inputs", 0, "name"),
        _with(2, "schema_version"),
        _with(None, "evaluation"),
        _without("calibration"),
        _with({"source": "embedded"}, "calibration"),
        _with("some/where/text.txt", "recipe", "calibration", "text"),
        _with("/etc/text", "recipe", "calibration", "text"),
        _with("a/b/c", "evaluation", "source"),
        _with("base", "inputs", 1, "role"),
    ],
)
def test_the_schema_refuses_what_is_wrong(
    schema: dict[str, Any], folders: dict[str, Path], change: Callable[[dict[str, Any]], None]
) -> None:
    manifest = read(folders["gguf"])
    change(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(manifest)


@pytest.mark.parametrize("text", ["org/name", "org/na-me@refs/pr/1:validation#body", "embedded", "a text.txt"])
def test_the_schema_takes_calibration_windows(schema: dict[str, Any], folders: dict[str, Path], text: str) -> None:
    manifest = read(folders["gguf"])
    windows = {"source": text, "windows": 3, "window": 64, "tokens": 192, "seed": 7, "sha256": "0" * 64}
    _with(windows, "calibration")(manifest)
    _with(text, "recipe", "calibration", "text")(manifest)
    jsonschema.Draft202012Validator(schema).validate(manifest)


# --- what it says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_are_all_there_with_their_hashes(folders: dict[str, Path], name: str) -> None:
    folder, manifest = folders[name], read(folders[name])
    actual = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert manifest["files"].keys() == actual - {MANIFEST_NAME, CARD_NAME, REPORT_NAME}
    for file, entry in manifest["files"].items():
        raw = (folder / file).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    listed = [file for artifact in manifest["artifacts"] for file in artifact["files"]]
    assert sorted(listed) == sorted(manifest["files"])
    for artifact in manifest["artifacts"]:
        assert artifact["bytes"] == sum((folder / file).stat().st_size for file in artifact["files"])
        assert (folder / artifact["entry"]).exists()


def _described(files: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    described = {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in files}
    assert len(described) == len(files)
    return described


def _actual(folder: Path, *patterns: str) -> dict[str, tuple[int, str]]:
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    return {f.name: (f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files}


def test_inputs_have_the_hash_of_every_file_that_decides_the_output(
    folders: dict[str, Path], inputs: tuple[Path, Path, Path]
) -> None:
    base, one, two = inputs
    found = read(folders["hf-unverified"])["inputs"]
    assert [(entry["role"], entry["name"]) for entry in found] == [("base", "small-base"), ("adapter", "first-lora")]
    assert len(list(base.glob("*.safetensors"))) > 2
    assert _described(found[0]["files"]) == _actual(base, "*.safetensors", "*.json", "README.md", "chat_template.jinja")
    weights = ("adapter_config.json", "adapter_model.safetensors")
    assert _described(found[1]["files"]) == _actual(one, *weights)

    found = read(folders["gguf"])["inputs"]
    assert [(entry["role"], entry["name"]) for entry in found] == [
        ("base", "small-base"), ("adapter", "first-lora"), ("adapter", "second-lora"),
    ]  # fmt: skip
    # The second adapter's tokenizer is used, and the base's is not.
    assert "tokenizer.json" not in _described(found[0]["files"])
    assert _described(found[2]["files"]) == _actual(two, *weights, "tokenizer*.json", "chat_template.jinja")


def test_adapters_are_summed_up(folders: dict[str, Path]) -> None:
    _, one, two = read(folders["gguf"])["inputs"]
    # Two layers' q_proj, and the head.
    assert one["adapter"] == {
        "method": "lora", "ranks": [4], "scales": [2.0], "targets": 3, "modules": ["lm_head", "q_proj"],
    }  # fmt: skip
    assert two["adapter"]["method"] == "rslora"
    assert two["adapter"]["ranks"] == [8]
    assert two["adapter"]["scales"] == [pytest.approx(8**0.5)]
    assert two["adapter"]["targets"] == 14
    merge = read(folders["gguf"])["merge"]
    assert merge["tensors_updated"] == 15
    assert merge["untied"] is True
    assert merge["tokenizer_from"] == "adapter"
    assert read(folders["hf-unverified"])["merge"]["tokenizer_from"] == "base"


def test_versions_are_those_installed(folders: dict[str, Path]) -> None:
    manifest = read(folders["gguf"])
    assert {"torch", "transformers", "peft", "gguf", "llama-cpp-python", "safetensors"} <= manifest["versions"].keys()
    for package, found in manifest["versions"].items():
        assert found == version(package)
    assert manifest["exporter"] == version("exporter")


def test_the_recipe_has_every_default_resolved(folders: dict[str, Path]) -> None:
    assert read(folders["hf-unverified"])["recipe"] == {
        "base": "small-base",
        "adapters": ["first-lora"],
        "format": "safetensors",
        "quant": ["bf16"],
        "options": {"max_shard_size": "100KB"},
        "verify": False,
        "compute_dtype": "float32",
        "calibration": {"text": None, "tokens": 16384, "window": 1024, "seed": 0},
        "evaluation": {"tokens": 4096, "max_tokens": 16384, "n_ctx": 512, "gate": {}, "answers": True},
    }
    found = read(folders["gguf"])["recipe"]
    assert found["calibration"]["text"] == "test_manifest.py"
    assert found["evaluation"] == {
        "tokens": 128,
        "max_tokens": 16384,
        "n_ctx": 64,
        "gate": {"*": 100.0},
        "answers": True,
    }


def test_tensors_are_those_of_the_files(folders: dict[str, Path]) -> None:
    for artifact in read(folders["gguf"])["artifacts"]:
        types = tensor_types(folders["gguf"] / artifact["entry"])
        assert {tensor["name"]: tensor["type"] for tensor in artifact["tensors"]} == types
        for kind, entry in artifact["types"].items():
            assert entry["tensors"] == sum(1 for found in types.values() if found == kind)
        assert sum(entry["share"] for entry in artifact["types"].values()) == pytest.approx(1, abs=1e-3)
    stored: dict[str, Any] = {}
    for file in folders["hf-unverified"].glob("*.safetensors"):
        stored |= unpack(file)[0]
    stored.pop("__metadata__")
    tensors = read(folders["hf-unverified"])["artifacts"][0]["tensors"]
    assert {t["name"]: (t["type"], t["shape"]) for t in tensors} == {
        name: (entry["dtype"], entry["shape"]) for name, entry in stored.items()
    }


def test_verdicts(folders: dict[str, Path]) -> None:
    for name, verdicts in (
        ("gguf", {"Q4_K_M": "passed", "F16": "passed"}),
        ("hf", {"fp32": "passed"}),
        ("gguf-unverified", {"Q8_0": "skipped"}),
        ("hf-unverified", {"bf16": "skipped"}),
        ("gguf-failed", {"Q2_K": "failed"}),
    ):
        manifest = read(folders[name])
        assert {a["quant"]: a["verification"]["verdict"] for a in manifest["artifacts"]} == verdicts
        assert (manifest["evaluation"] is None) == ("skipped" in verdicts.values())
    figures = read(folders["gguf"])["artifacts"][1]["verification"]
    evaluation = read(folders["gguf"])["evaluation"]
    assert figures["tokens_scored"] == evaluation["tokens_scored"] == evaluation["windows"] * 31
    assert figures["delta"] == pytest.approx(figures["perplexity"] / figures["reference_perplexity"] - 1)
    low, high = figures["delta_interval"]
    assert low < figures["delta"] < high
    assert figures["kl_divergence"]["median"] <= figures["kl_divergence"]["p90"] <= figures["kl_divergence"]["largest"]
    profile = figures["profile"]
    assert profile["kl_quantiles"][-1] == [1.0, figures["kl_divergence"]["largest"]]
    assert sum(map(sum, profile["probability"])) == figures["tokens_scored"]
    # At most half of the sum of both KL divergences, which for near predictions are alike.
    assert 0 < figures["jensen_shannon"]["mean"] < figures["kl_divergence"]["mean"]
    assert figures["top_k_divergence"] is None
    assert figures["runtime"].startswith("llama-cpp-python ")
    assert read(folders["hf"])["artifacts"][0]["verification"]["runtime"].startswith("transformers ")


def test_figures_of_the_likeliest_tokens_or_of_one_window_validate(schema: dict[str, Any]) -> None:
    """What a server gives that has no whole predictions; and one window, which has no errors over windows."""
    for windows in (2, 1):
        values = np.full((windows, 4), -1.0)
        scores = TokenScores(values, np.zeros(values.shape, np.int64))
        comparison = compare(scores, scores, Divergences(top_k=-values, k=20))
        found = json.loads(json.dumps(verification_json(judge("vllm 1", comparison, FALLBACK_GATE))))
        assert found["top_k_divergence"]["k"] == 20
        assert found["kl_divergence"] is found["jensen_shannon"] is None
        assert (found["delta_interval"] is None) == (windows == 1)
        one = {"$ref": "#/$defs/verified", "$defs": schema["$defs"]}
        jsonschema.Draft202012Validator(one).validate(found)
        _with(found["top_k_divergence"], "kl_divergence")(found)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(one).validate(found)


def test_weights_are_summed_up_where_they_were_verified(folders: dict[str, Path]) -> None:
    for name in NAMES:
        for artifact in read(folders[name])["artifacts"]:
            found = artifact["weights"]
            assert (found is None) == ("unverified" in name)
            measured = [tensor for tensor in artifact["tensors"] if "relative_error" in tensor]
            assert len(measured) == (len(artifact["tensors"]) if found else 0)
            if found:
                assert found["broken"] == []
                assert abs(found["survival"] - 1) < 0.2
                changed = [tensor for tensor in measured if "survival" in tensor]
                assert len(changed) == read(folders[name])["merge"]["tensors_updated"]
                assert found["layers"].keys() == {"0", "1"}


# --- what it does not say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_this_machine_or_of_the_time_is_in_it(
    folders: dict[str, Path], inputs: tuple[Path, Path, Path], name: str
) -> None:
    text = (folders[name] / MANIFEST_NAME).read_text(encoding="utf-8")
    places = {str(path.parent) for path in (*folders.values(), *inputs)} | {str(ROOT), str(Path.home()), os.getcwd()}
    for place in places - {"/"}:
        assert place not in text
    for word in {getpass.getuser(), socket.gethostname()} - {""}:
        assert not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), word
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", text)

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield key
                yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)
        elif isinstance(value, str):
            yield value

    for string in walk(json.loads(text)):
        assert not string.startswith(("/", "~", "file:")), string
        assert not re.search(r"[A-Za-z]:\\", string), string


@pytest.mark.parametrize(("format_", "quant"), [("gguf", "Q4_K_M"), ("safetensors", "bf16")])
def test_it_is_the_same_to_the_byte_elsewhere_and_later(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str, quant: str
) -> None:
    export_to(tmp_path / "first", *inputs, format=format_, quant=(quant,), threads=1, block_bytes=4096)
    for index, folder in enumerate(inputs):
        copied = copy(folder, tmp_path / "elsewhere" / str(index) / folder.name)
        for file in copied.iterdir():
            os.utime(file, (1e9, 1e9))
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.chdir(tmp_path / "elsewhere")
    others = [Path(str(index)) / folder.name for index, folder in enumerate(inputs)]
    values = recipe(others[0], others[1:], Path("second"), format=format_, quant=(quant,))
    export(values, Execution(device="cpu", threads=3))
    second = tmp_path / "elsewhere" / "second"
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
