"""The vLLM runtime: against a stand-in for what can go wrong, and (`serve`) against vLLM itself for what is right."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from exporter.errors import RecipeError, RuntimeScoreError, RuntimeUnavailableError
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.libraries.child_process import ServerProcess, free_port, last_words
from exporter.recipe import Calibration, Evaluation
from exporter.runtimes.base import TopKScores
from exporter.runtimes.transformers.runtime import Transformers
from exporter.runtimes.vllm import runtime as vllm
from exporter.runtimes.vllm.api import Api
from exporter.runtimes.vllm.runtime import ENVIRONMENT, Vllm, available, serve_python
from exporter.runtimes.vllm.server import not_served
from exporter.runtimes.vllm.session import VllmSession
from exporter.tokens.prompt_texts import CONVERSATIONS
from exporter.tokens.windows import Windows, make_windows
from tests.exports import export_to
from tests.folders import copy, edit_json
from tests.merged import random_windows
from tests.vllm_server import (
    CHARACTERS,
    CRASH,
    END,
    VOCABULARY,
    StandIn,
    log_probabilities,
    logits,
    make_environment,
    needs_vllm,
    serve,
)

WINDOWS = random_windows(5, 16, VOCABULARY)
K = 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder, as far as the stand-in looks at one."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A maker of environments whose vLLM is the stand-in, with a fault; the last one made is in force."""

    def make(fault: str = "") -> Path:
        folder = make_environment(tmp_path / "environment", fault)
        monkeypatch.setenv(ENVIRONMENT, str(folder))
        return folder

    return make


@pytest.fixture
def endpoint() -> Iterator[Callable[..., str]]:
    """A maker of running stand-ins, given the options of `StandIn`."""
    servers: list[StandIn] = []

    def make(**options: Any) -> str:
        servers.append(serve(**options))
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def score(model: Path, endpoint: str | None = None, windows: Windows = WINDOWS, **options: Any) -> TopKScores:
    return Vllm(endpoint, k=K, **options).score(model, windows, lambda _: None)


def failure(model: Path, endpoint: str | None = None, **options: Any) -> RuntimeScoreError:
    """What the model is blamed for."""
    return fails(RuntimeScoreError, model, endpoint, **options)


def unavailable(model: Path, endpoint: str | None = None, **options: Any) -> RuntimeScoreError:
    """What is no fault of the model's."""
    return fails(RuntimeUnavailableError, model, endpoint, **options)


def fails(kind: type[RuntimeScoreError], model: Path, endpoint: str | None = None, **options: Any) -> RuntimeScoreError:
    with pytest.raises(RuntimeScoreError) as caught:
        score(model, endpoint, **options)
    assert type(caught.value) is kind
    assert caught.value.exit_status == 1
    return caught.value


def record(environment: Path) -> dict[str, Any]:
    """What the last stand-in that was started tells of itself, once it does."""
    deadline = time.monotonic() + 20
    while not (environment / "record.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    told: dict[str, Any] = json.loads((environment / "record.json").read_text())
    return told


def running(pids: list[int]) -> list[int]:
    """Those that still run; zombies do not."""
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def all_ended(told: dict[str, Any], seconds: float = 10) -> bool:
    """Whether server, engine and scratch folder go within so many seconds."""
    deadline = time.monotonic() + seconds
    while running(told["pids"]) or Path(told["folder"]).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- scores --------------------------------------------------------------------------------------------------------


def check_scores(found: TopKScores, windows: Windows = WINDOWS) -> None:
    """Against the stand-in's own distributions."""
    positions = range(windows.first_scored + 1, windows.n_ctx)
    whole = np.array([[log_probabilities(window, position) for position in positions] for window in windows.ids])
    targets = np.array(windows.ids)[:, windows.first_scored + 1 :]
    order = np.argsort(-whole, axis=-1, kind="stable")[..., :K]
    assert np.array_equal(found.log_probabilities, np.take_along_axis(whole, targets[..., None], -1)[..., 0])
    assert np.array_equal(found.top_tokens, whole.argmax(-1))
    best = np.sort(whole, axis=-1)[..., ::-1][..., :K]
    assert np.array_equal(found.top.log_probabilities, best)
    # Of equal ones at the last place, either may be among the k.
    assert np.array_equal(np.take_along_axis(whole, found.top.ids, -1), best)
    assert np.array_equal(found.top.ids[..., : K - 1], order[..., : K - 1])
    assert found.log_probabilities.dtype == found.top.log_probabilities.dtype == np.float64
    assert found.top_tokens.dtype == found.top.ids.dtype == np.int64
    assert found.top.ids.shape == (len(windows.ids), windows.scored, K)


def test_a_server_of_our_own_scores_and_is_gone(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment()
    check_scores(score(model))
    told = record(folder)
    assert running(told["pids"]) == []
    assert not Path(told["folder"]).exists()


def test_a_running_server_scores_and_stays(model: Path, endpoint: Callable[..., str]) -> None:
    address = endpoint(adapters=["a-lora"])
    check_scores(score(model, address))
    check_scores(score(model, f"{address}/v1/"))


@pytest.mark.parametrize("n_ctx", [3, 4, 17])
def test_windows_of_any_length(model: Path, endpoint: Callable[..., str], n_ctx: int) -> None:
    windows = random_windows(3, n_ctx, VOCABULARY, seed=n_ctx)
    check_scores(score(model, endpoint(), windows), windows)


def test_every_window_is_reported(model: Path, endpoint: Callable[..., str]) -> None:
    seen: list[int] = []
    Vllm(endpoint()).score(model, WINDOWS, seen.append)
    assert seen == [1] * 5


def test_minus_infinity_comes_back_as_such(model: Path, endpoint: Callable[..., str]) -> None:
    """JSON has no word for it, so vLLM writes -9999."""
    found = score(model, endpoint(fault="clamped"))
    assert (found.log_probabilities[:, -1] == -np.inf).all()
    assert np.isfinite(found.log_probabilities[:, :-1]).all()


def test_no_more_likeliest_tokens_than_there_are_tokens(model: Path, endpoint: Callable[..., str]) -> None:
    found = Vllm(endpoint(), k=1000).score(model, WINDOWS, lambda _: None)
    assert found.top.ids.shape[-1] == VOCABULARY
    assert np.array_equal(np.sort(found.top.ids, -1), np.broadcast_to(np.arange(VOCABULARY), found.top.ids.shape))


# --- what a server of our own is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dtype", "longer"),
    [
        ({}, "auto", None),
        ({"dtype": "float32"}, "float32", None),
        ({"dtype": None, "torch_dtype": "float32"}, "float32", None),
        ({"dtype": "float32", "quantization_config": {"quant_method": "gptq"}}, "auto", None),
        ({"max_position_embeddings": 16}, "auto", "1"),
        ({"max_position_embeddings": 15}, "auto", None),
    ],
    ids=["plain", "float32", "old-name", "packed", "exactly-as-long", "too-short"],
)
def test_arguments_follow_the_model(
    model: Path, environment: Callable[..., Path], changes: dict[str, Any], dtype: str, longer: str | None
) -> None:
    edit_json(model / "config.json", **changes)
    folder = environment()
    score(model)
    told = record(folder)
    arguments = told["arguments"]
    assert arguments["--dtype"] == dtype
    assert told["environment"].get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == longer
    assert (arguments["--host"], arguments["--max-model-len"], arguments["--max-logprobs"]) == ("127.0.0.1", "17", "4")
    assert arguments["--model"] == str(model)


def test_it_is_kept_off_the_network_and_from_what_is_ours(
    model: Path, environment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "ours")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    folder = environment()
    score(model)
    given = record(folder)["environment"]
    assert given["HF_HUB_OFFLINE"] == given["VLLM_NO_USAGE_STATS"] == given["DO_NOT_TRACK"] == "1"
    assert not {"PYTHONPATH", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"} & set(given)


# --- servers that fail ---------------------------------------------------------------------------------------------


def test_a_slow_start_is_waited_for(model: Path, environment: Callable[..., Path]) -> None:
    environment("slow")
    check_scores(score(model))


def test_a_server_that_fails_is_quoted(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment("crash")
    error = failure(model)
    assert error.thing == "model"
    assert error.found == (
        "vLLM did not start (exit status 1): ValueError: Following weights were not initialized: {'up'}"
    )
    assert all_ended(record(folder), 0)


def test_a_server_that_is_never_ready_is_given_up(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment("unhealthy")
    error = unavailable(model, start_seconds=6)
    assert error.found.startswith("vLLM did not start (no answer within 6 s): Resolved architecture")
    assert all_ended(record(folder), 0)


def test_a_server_that_ends_on_the_way_is_quoted(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment("dies")
    assert "MemoryError: Cannot allocate 9 GiB" in unavailable(model).found
    assert all_ended(record(folder), 0)


def test_an_interpreter_that_cannot_be_run_fails(model: Path, environment: Callable[..., Path]) -> None:
    (environment() / "bin" / "python").write_text("#!/no/such/interpreter\n")
    assert "exit status 127" in unavailable(model).found


def test_a_server_that_was_killed_says_nothing_of_the_model(model: Path, environment: Callable[..., Path]) -> None:
    """As the kernel ends one when memory runs out."""
    python = environment() / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    assert "exit status 137" in unavailable(model).found


@pytest.mark.parametrize(
    "words",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU memory utilization",
    ],
)
def test_a_server_that_is_out_of_memory_says_nothing_of_the_model(words: str) -> None:
    assert type(not_served("model", "vLLM did not start (exit status 1)", [words])) is RuntimeUnavailableError


ANSWERS = {
    "refuses": "greater than max allowed: 5",
    "no-logprobs": "without prompt_logprobs",
    "short": "prompt_logprobs of 15 tokens for a window of 16",
    "few": r"[23] tokens at position 15 where 4 were asked for",
    "no-right-token": r"no log-probability of token \d+ at position 15",
}


@pytest.mark.parametrize(("fault", "words"), ANSWERS.items())
def test_an_answer_that_is_not_what_was_asked_for_fails(
    model: Path, endpoint: Callable[..., str], environment: Callable[..., Path], fault: str, words: str
) -> None:
    assert re.search(words, failure(model, endpoint(fault=fault)).found)
    folder = environment(fault)
    assert re.search(words, failure(model).found)
    assert all_ended(record(folder), 0)


@pytest.mark.parametrize(("fault", "words"), [("not-json", "not JSON"), ("no-choices", "no choices")])
def test_an_answer_of_another_kind_fails(model: Path, endpoint: Callable[..., str], fault: str, words: str) -> None:
    with pytest.raises(RuntimeScoreError, match=words):
        score(model, endpoint(fault=fault))


def test_tokens_beyond_the_vocabulary_are_refused_before_a_server_starts(
    model: Path, environment: Callable[..., Path]
) -> None:
    edit_json(model / "config.json", vocab_size=40)
    folder = environment()
    error = failure(model, windows=Windows(((1, 2, 3, 40),), 4, "x", "0"))
    assert (error.found, error.expected) == ("40 tokens", "at least 41")
    assert not (folder / "record.json").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"], ids=["missing", "cut", "list", "empty"])
def test_what_is_no_model_folder_is_refused(model: Path, environment: Callable[..., Path], content: str | None) -> None:
    environment()
    if content is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_text(content)
    assert "config.json" in failure(model).found


def test_last_words_are_the_exceptions_and_not_their_echoes() -> None:
    assert last_words(CRASH.splitlines()) == ["ValueError: Following weights were not initialized: {'up'}"]
    assert last_words(["one", "", "two", "three", "four"]) == ["two", "three", "four"]
    echo = "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above."
    assert last_words(["(EngineCore pid=7) killed", echo]) == [echo.removeprefix("(APIServer pid=3) ")]
    assert last_words([]) == []
    assert len(last_words(["ValueError: " + "x" * 999])[0]) == 300
    invalid = [
        "p.ValidationError: 1 validation error for ModelConfig",
        "  Value error, too long [type=value_error]",
        "x",
    ]
    assert last_words(invalid) == ["Value error, too long [type=value_error]"]
    mentioned = "WARNING 11-24 09:28:54 [a.py:1] This can cause errors like `OSError: [Errno 24] Too many open files`."
    assert last_words([mentioned, "(Worker pid=1) ERROR 11-24 11:39:30 [b.py:9] torch.E.SomeError: no"]) == [
        "torch.E.SomeError: no"
    ]


# --- nothing is left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_exception_ends_the_server(model: Path, environment: Callable[..., Path], kind: type[BaseException]) -> None:
    folder = environment()

    def stop(_: int) -> None:
        raise kind

    with pytest.raises(kind):
        Vllm(k=K).score(model, WINDOWS, stop)
    assert all_ended(record(folder), 0)


SCORING = """
import sys
from pathlib import Path
from exporter.tokens.windows import Windows
from exporter.runtimes.vllm.runtime import Vllm
Vllm(k=4).score(Path(sys.argv[1]), Windows(((1, 2, 3, 4),), 4, "x", "0"), lambda _: None)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fault", ["hangs", "unhealthy"])
def test_a_signal_ends_the_server_with_us(
    model: Path, environment: Callable[..., Path], fault: str, number: signal.Signals
) -> None:
    """While a request is under way, and while the server starts."""
    folder = environment(fault)
    with subprocess.Popen([sys.executable, "-c", SCORING, model], stderr=subprocess.DEVNULL) as ours:
        told = record(folder)
        time.sleep(0.5)
        assert running(told["pids"]) == told["pids"]
        ours.send_signal(number)
        assert ours.wait(30) != 0
    assert all_ended(told)


def test_the_guard_s_own_end_takes_the_server_along(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment("hangs")
    with subprocess.Popen([sys.executable, "-c", SCORING, model], stderr=subprocess.PIPE, text=True) as ours:
        told = record(folder)
        (guard,) = psutil.Process(ours.pid).children()
        guard.kill()
        _, words = ours.communicate(timeout=30)
    assert "RuntimeScoreError" in words
    assert all_ended(told)


@pytest.mark.slow
def test_what_will_not_end_is_killed(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment("stubborn")
    with subprocess.Popen([sys.executable, "-c", SCORING, model]) as ours:
        told = record(folder)
        time.sleep(0.5)
        ours.kill()
    time.sleep(1)
    assert running(told["pids"]) == told["pids"]
    assert all_ended(told, 40)


# --- running servers -----------------------------------------------------------------------------------------------


def test_a_server_for_shorter_prompts_is_refused(model: Path, endpoint: Callable[..., str]) -> None:
    assert "for 16 tokens, where a window and the next token are 17" in unavailable(
        model, endpoint(max_model_len=16)
    ).found  # fmt: skip


@pytest.mark.parametrize(("size", "words"), [(63, "Token id 63 is out of vocabulary"), (65, "more than the 64 tokens")])
def test_a_server_of_another_vocabulary_is_refused(
    model: Path, endpoint: Callable[..., str], size: int, words: str
) -> None:
    error = unavailable(model, endpoint(vocabulary=size))
    assert words in error.found
    assert error.thing.startswith("model at http://")


def test_a_server_of_several_models_is_refused(
    model: Path, endpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "models", lambda self: [{"id": "one"}, {"id": "two"}])
    assert "2 models (one, two)" in unavailable(model, endpoint()).found


def test_what_is_no_server_is_refused(model: Path) -> None:
    assert "Connection refused" in unavailable(model, f"http://127.0.0.1:{free_port()}").found


@pytest.mark.parametrize("address", ["", "localhost:8000", "ftp://host", "http://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(RecipeError, match="no http address"):
        Vllm(address)


def test_a_key_is_shown_to_it(model: Path, endpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    address = endpoint(key="secret")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    error = unavailable(model, address)
    assert "status 401" in error.found
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    check_scores(score(model, address))


# --- the environment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", "/no/such/environment", None])
def test_no_environment_names_the_remedy(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str | None
) -> None:
    monkeypatch.setattr(vllm, "_made", lambda: None)
    if named is None:
        monkeypatch.delenv(ENVIRONMENT, raising=False)
    else:
        monkeypatch.setenv(ENVIRONMENT, named)
    # One that was asked for and is not there must not be passed over in silence.
    assert available() == bool(named)
    error = unavailable(model)
    assert error.thing == "runtime vllm"
    assert "make serve-env" in error.remedy


def test_only_a_finished_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(vllm, "__file__", str(tmp_path / "exporter" / "runtimes" / "vllm" / "runtime.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "beside" / ".venv"))
    for place in (tmp_path / "beside", tmp_path):
        assert not (place / ".venv-serve").exists()
        make_environment(place / ".venv-serve")
        (place / ".venv-serve" / ".ready").touch()
        assert available()
        assert serve_python() == place / ".venv-serve" / "bin" / "python"
    for place in (tmp_path / "beside", tmp_path):
        (place / ".venv-serve" / ".ready").unlink()
    assert not available()


def test_version_names_the_packages(environment: Callable[..., Path], endpoint: Callable[..., str]) -> None:
    environment()
    assert Vllm().version() == "vllm-cpu 0.32.0, torch 2.13.0+cpu"
    assert Vllm(endpoint()).version() == "vllm 0.32.0 at an endpoint"


# --- vLLM itself ---------------------------------------------------------------------------------------------------


def demo_windows(folder: Path, n_ctx: int) -> Windows:
    return make_windows(Calibration(), Evaluation(tokens=4 * n_ctx, n_ctx=n_ctx), TokenizerFiles.choose(folder, ()))


@pytest.mark.serve
@needs_vllm
@pytest.mark.parametrize(
    ("quant", "largest", "mean"),
    # In float32 the two differ by the order of sums; in bf16 each rounds every activation in its own way.
    [("fp32", 1e-4, 1e-5), ("bf16", 0.15, 0.015)],
)
def test_vllm_s_scores_are_transformers(demo: Path, tmp_path: Path, quant: str, largest: float, mean: float) -> None:
    export_to(tmp_path / "out", demo / "base", demo / "adapter", quant=quant)
    windows = demo_windows(tmp_path / "out", 64)
    shared = set(os.listdir("/dev/shm"))
    children = psutil.Process().children(recursive=True)
    found = Vllm().score(tmp_path / "out", windows, lambda _: None)
    assert psutil.Process().children(recursive=True) == children
    assert set(os.listdir("/dev/shm")) <= shared
    expected = Transformers().score(tmp_path / "out", windows, lambda _: None)
    difference = np.abs(found.log_probabilities - expected.log_probabilities)
    assert difference.max() < largest
    assert difference.mean() < mean
    assert (found.top_tokens == expected.top_tokens).mean() > 0.95
    assert np.array_equal(found.top.ids[:, :, 0], found.top_tokens)
    assert (np.diff(found.top.log_probabilities, axis=-1) <= 0).all()
    assert np.exp(found.top.log_probabilities).sum(-1).max() < 1 + 1e-5


@pytest.mark.serve
@needs_vllm
def test_vllm_s_own_words_on_a_model_that_it_does_not_load(demo: Path, tmp_path: Path) -> None:
    folder = copy(demo / "base", tmp_path / "model")
    windows = demo_windows(folder, 64)
    edit_json(folder / "config.json", max_position_embeddings=48)
    error = failure(folder, windows=windows)
    assert "max_model_len (65) is greater than the derived max_model_len" in error.found


@pytest.mark.serve
@needs_vllm
def test_a_running_vllm_scores_alike_and_another_model_is_told_apart(demo: Path, tmp_path: Path) -> None:
    folder = copy(demo / "base", tmp_path / "model")
    windows = demo_windows(folder, 64)
    port = free_port()
    command = [str(serve_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28)]
    address = f"http://127.0.0.1:{port}/v1"
    with ServerProcess(command, dict(os.environ)) as server:
        assert server.wait_until(Api(address.removesuffix("/v1")).healthy, 600), server.lines
        found = Vllm(address).score(folder, windows, lambda _: None)
        assert Vllm(address).version() == "vllm 0.32.0 at an endpoint"
        edit_json(folder / "config.json", vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"] + 1)
        assert "is out of vocabulary" in unavailable(folder, address, windows=windows).found
    expected = Transformers().score(demo / "base", windows, lambda _: None)
    assert np.abs(found.log_probabilities - expected.log_probabilities).mean() < 0.015


# --- answers -------------------------------------------------------------------------------------------------------


def test_it_tokenizes_renders_goes_on_and_stops(model: Path, endpoint: Callable[..., str]) -> None:
    with Vllm(endpoint()).session(model, 24) as session:
        assert session.tokenize("a b", special=True) == [CHARACTERS.index(letter) for letter in "a b"]
        # The server has no way to read a special token's text as plain text.
        assert session.tokenize("a b", special=False) is None
        tools = [{"type": "function", "function": {"name": "weather"}}]
        conversation = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "thinking": False}
        assert session.render(conversation) == "weather thinking False user Hi. assistant"
        prompt = (3, 4, 5)
        (found,) = session.generate([prompt], 4)
        for number, token in enumerate(found.tokens):
            before = [*prompt, *found.tokens[:number]]
            scores = logits(before, len(before))
            assert token == scores.index(max(scores))
        assert found.stopped == (found.tokens[-1] == END)
        assert session.stops_on(END)
        assert not session.stops_on(END - 1)
        assert session.stop_ids() is None


def test_arguments_of_a_call_are_sent_as_the_api_wants_them(model: Path) -> None:
    """The server refuses an object there (seen with vLLM 0.32), and parses the text for the template."""

    class Recording(Api):
        def post(self, path: str, body: Any) -> Any:
            sent.append(body)
            return {"tokens": [], "prompt": "rendered"}

    sent: list[Any] = []
    session = VllmSession(model, Recording("http://localhost:1"), "model")
    assert session.render(CONVERSATIONS["tool call"]) == "rendered"
    (call,) = sent[0]["messages"][1]["tool_calls"]
    given = CONVERSATIONS["tool call"]["messages"][1]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == given["function"]["arguments"]
    assert isinstance(given["function"]["arguments"], dict)


def test_a_server_of_our_own_answers_and_is_gone(model: Path, environment: Callable[..., Path]) -> None:
    folder = environment()
    with Vllm().session(model, 24) as session:
        assert len(session.generate([(1, 2)], 3)[0].tokens) <= 3
        assert record(folder)["arguments"]["--max-model-len"] == "24"
    assert running(record(folder)["pids"]) == []


@pytest.mark.parametrize("fault", ["no-token-ids", "not-json"])
def test_an_answer_that_is_none_has_a_name(model: Path, endpoint: Callable[..., str], fault: str) -> None:
    with (
        pytest.raises(RuntimeScoreError) as caught,
        Vllm(endpoint(fault=fault)).session(model, 24) as session,
    ):
        session.generate([(1, 2)], 3)
    assert "/v1/completions" in caught.value.found


@pytest.mark.parametrize(("at_endpoint", "kind"), [(True, RuntimeUnavailableError), (False, RuntimeScoreError)])
def test_no_answer_is_the_model_s_fault_where_the_server_is_its_own(
    model: Path, at_endpoint: bool, kind: type[RuntimeScoreError]
) -> None:
    session = VllmSession(model, Api(f"http://127.0.0.1:{free_port()}"), "model", at_endpoint=at_endpoint)
    with pytest.raises(RuntimeScoreError, match="Connection refused") as caught:
        session.generate([(1, 2)], 3)
    assert type(caught.value) is kind
