"""llama.cpp's scores, against transformers' logits in float32; and what it says of files that it cannot load."""

from __future__ import annotations

import ctypes
import resource
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
import pytest
import torch

from exporter.errors import RefusalError, RuntimeScoreError, RuntimeUnavailableError
from exporter.runtimes.base import TokenScores
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.runtimes.registry import load_runtime
from exporter.tokens.windows import Windows
from tests.merged import export_gguf, load_peft, peft_log_probabilities, random_windows

# Tokens of the tests' tokenizer; the rows of the embedding beyond are padding.
TOKENS = 384
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def score(file: Path, windows: Windows) -> TokenScores:
    return LlamaCpp().score(file, windows, lambda _: None)


@pytest.fixture(scope="session")
def small(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen2")


@pytest.fixture(scope="session")
def small_gguf(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(small, tmp_path_factory.mktemp("small") / "out")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1000000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "rope_theta": 1000000.0},
    ],
    ids=["1e4", "1e6", "linear", "yarn", "yarn-beta"],
)
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_scores_are_transformers(
    make_base: Callable[..., Path], tmp_path: Path, family: str, tied: bool, rope: dict[str, Any]
) -> None:
    base = make_base(family, tied=tied, rope_parameters=rope)
    windows = random_windows(2, 128, TOKENS)
    expected = peft_log_probabilities(load_peft(base), windows)[:, windows.first_scored :]
    scores = score(export_gguf(base, tmp_path / "out"), windows)
    assert np.abs(scores.log_probabilities - expected).max() < 1e-3


def test_an_attention_factor_of_its_own_is_served_right_or_refused(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp overrides yarn_attn_factor by its own 0.1 ln(factor) + 1, whatever the file says."""
    base = make_base("qwen3", tied=True, rope_parameters=YARN | {"attention_factor": 1.0})
    file = None
    with suppress(RefusalError):
        file = export_gguf(base, tmp_path / "out")
    if file is not None:
        windows = random_windows(2, 128, TOKENS)
        expected = peft_log_probabilities(load_peft(base), windows)[:, windows.first_scored :]
        assert np.abs(score(file, windows).log_probabilities - expected).max() < 1e-3


def test_a_rope_that_is_not_the_model_s_would_be_seen(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """The comparison above can tell ropes apart, and one attention factor from another."""
    windows = random_windows(2, 128, TOKENS)
    variations = (YARN, YARN | {"attention_factor": 1.0}, YARN | {"rope_theta": 1e6}, {"rope_type": "default"})
    ropes = [{"rope_theta": 1e4} | dict(variation) for variation in variations]
    found = [
        peft_log_probabilities(load_peft(make_base("qwen3", tied=True, rope_parameters=rope)), windows)
        for rope in ropes
    ]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert np.abs(one - other)[:, windows.first_scored :].max() > 5e-3


def test_scores_of_a_merged_adapter_are_those_of_the_unmerged_one(
    small: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(small)
    windows = random_windows(2, 64, TOKENS)
    expected = peft_log_probabilities(load_peft(small, adapter), windows)[:, windows.first_scored :]
    without = peft_log_probabilities(load_peft(small), windows)[:, windows.first_scored :]
    found = score(export_gguf(small, tmp_path / "out", adapters=(adapter,)), windows).log_probabilities
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(without - expected).max() > 1e-2


@pytest.mark.parametrize("n_ctx", [16, 17, 64, 600])
def test_the_second_half_of_a_window_is_scored_but_for_its_end(
    make_base: Callable[..., Path], tmp_path: Path, n_ctx: int
) -> None:
    base = make_base("qwen3")
    windows = random_windows(2, n_ctx, TOKENS)
    assert windows.first_scored == n_ctx // 2
    assert windows.scored == n_ctx - 1 - n_ctx // 2
    assert windows.tokens_scored == 2 * windows.scored
    scores = score(export_gguf(base, tmp_path / "out"), windows)
    assert scores.log_probabilities.shape == scores.top_tokens.shape == (2, windows.scored)
    # Position by position, so that a shift by one would be seen: what is scored are the tokens n_ctx/2 + 1 … n_ctx - 1.
    logits = load_peft(base)(input_ids=torch.tensor(windows.ids)).logits.detach()
    for window, ids in enumerate(windows.ids):
        for index in range(windows.scored):
            position = n_ctx // 2 + index
            row = torch.log_softmax(logits[window, position].double(), dim=-1)
            assert scores.log_probabilities[window, index] == pytest.approx(row[ids[position + 1]].item(), abs=1e-3)
            best = row[scores.top_tokens[window, index]]
            assert best >= row.max() - 1e-3


def test_nothing_is_carried_from_one_window_to_the_next(small_gguf: Path) -> None:
    windows = random_windows(3, 64, TOKENS)
    together = score(small_gguf, windows)
    for index in range(3):
        alone = score(small_gguf, replace(windows, ids=windows.ids[index : index + 1]))
        assert np.array_equal(alone.log_probabilities[0], together.log_probabilities[index])
        assert np.array_equal(alone.top_tokens[0], together.top_tokens[index])


def test_every_window_is_reported(small_gguf: Path) -> None:
    seen: list[int] = []
    LlamaCpp().score(small_gguf, random_windows(3, 16, TOKENS), seen.append)
    assert seen == [1, 1, 1]


def test_tokens_beyond_the_vocabulary_are_refused(small_gguf: Path) -> None:
    windows = Windows(((1, 2, 3, 400) * 4,), 16, "x", "0")
    with pytest.raises(RuntimeScoreError) as caught:
        score(small_gguf, windows)
    assert caught.value.found == "400 tokens"
    assert caught.value.expected == "at least 401"


# --- files that llama.cpp cannot load ------------------------------------------------------------------------------


def _type_offset(raw: bytes, name: bytes) -> int:
    """Where the header holds the type of a matrix: behind its name, two dimensions of 8 bytes, and their number."""
    return raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16


def _patched(raw: bytes, offset: int, value: bytes) -> bytes:
    return raw[:offset] + value + raw[offset + len(value) :]


MATRIX = b"blk.1.ffn_up.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"", "could not load"),
        (lambda raw: raw[:3], "could not load"),
        (lambda raw: raw[:1000], "could not load"),
        (lambda raw: raw[: len(raw) // 2], "not within the file bounds"),
        (lambda raw: raw[:-1], "not within the file bounds"),
        (lambda raw: b"GGML" + raw[4:], "magic"),
        (lambda raw: b"\x89PNG" + raw[4:], "magic"),
        (lambda raw: _patched(raw, 4, struct.pack("<I", 77)), "version 77"),
        (lambda raw: _patched(raw, 8, struct.pack("<Q", 2**60)), "could not load"),
        (lambda raw: _patched(raw, 16, struct.pack("<Q", 2**62)), "could not load"),
        (lambda raw: _patched(raw, _type_offset(raw, MATRIX), struct.pack("<I", 9999)), "invalid ggml type 9999"),
        (lambda raw: _patched(raw, _type_offset(raw, MATRIX), struct.pack("<I", 8)), "has offset"),
        (lambda raw: _patched(raw, _type_offset(raw, MATRIX) + 4, struct.pack("<Q", 2**50)), "has offset"),
        (lambda raw: raw.replace(b"qwen2", b"qwenX"), "unknown model architecture: 'qwenX'"),
        (lambda raw: raw.replace(MATRIX, b"blk.1.ffn_op.weight"), "blk.1.ffn_up.weight"),
    ],
    ids=[
        "empty", "three-bytes", "within-the-header", "half", "a-byte-short", "old-magic", "png", "version",
        "tensor-count", "key-count", "type", "another-type", "offset", "architecture", "tensor-name",
    ],
)  # fmt: skip
def test_a_damaged_file_fails_in_llama_cpp_s_own_words(
    small_gguf: Path, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damage(small_gguf.read_bytes()))
    with pytest.raises(RuntimeScoreError, match=words) as caught:
        score(file, random_windows(1, 16, TOKENS))
    assert type(caught.value) is RuntimeScoreError
    assert caught.value.thing == "damaged.gguf"
    assert caught.value.exit_status == 1
    assert str(tmp_path) not in caught.value.thing


def test_memory_that_runs_out_is_no_fault_of_the_file(small_gguf: Path) -> None:
    score(small_gguf, random_windows(1, 16, TOKENS))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (32 << 20), hard))
    try:
        with (
            pytest.raises(RuntimeUnavailableError, match="could not make a context"),
            LlamaCpp().session(small_gguf, 1 << 24),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", ["missing.gguf", ""])
def test_no_file_fails(tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeScoreError, match="could not load"):
        score(tmp_path / name, random_windows(1, 16, TOKENS))


def test_a_failure_does_not_spoil_the_next_run(small_gguf: Path, tmp_path: Path) -> None:
    windows = random_windows(1, 16, TOKENS)
    before = score(small_gguf, windows)
    with pytest.raises(RuntimeScoreError):
        score(tmp_path / "missing.gguf", windows)
    assert np.array_equal(score(small_gguf, windows).log_probabilities, before.log_probabilities)


def test_no_callback_of_ours_is_left_behind_in_llama_cpp(small_gguf: Path) -> None:
    """A log callback that is freed while llama.cpp still has its address calls whatever lies there next."""
    score(small_gguf, random_windows(1, 16, TOKENS))
    calls: list[bytes] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    # Closures take the place of freed ones.
    fresh = [kind(lambda _level, text, _data: calls.append(text)) for _ in range(64)]
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(small_gguf).encode(), parameters)
    llama_cpp.llama_model_free(model)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))
    assert len(fresh) == 64
    assert calls == []


def test_version_names_the_package() -> None:
    assert load_runtime("llamacpp").version() == f"llama-cpp-python {version('llama-cpp-python')}"
