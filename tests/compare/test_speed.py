"""Speeds are counted tokens over measured seconds, of artifacts in the runtimes that serve them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from exporter.compare.speed import OUTPUT_TOKENS, PROMPT_TOKENS, measure
from exporter.runtimes.base import Continuation
from tests.commands import invoke
from tests.exports import export_to


class Metered:
    """A session whose time is known: seconds a token of a prompt, and a token of an answer but for its first."""

    stop_evidence: Literal["generation", "vocabulary"] = "generation"

    def __init__(self, reading: float, writing: float, ends_after: int) -> None:
        self.now = 0.0
        self._reading, self._writing, self._ends_after = reading, writing, ends_after

    def tokenize(self, text: str, *, special: bool) -> list[int] | None:
        return list(text.encode())

    def render(self, conversation: Mapping[str, Any]) -> str:
        raise AssertionError("nothing to render")

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        (prompt,) = prompts
        given = min(tokens, self._ends_after)
        self.now += len(prompt) * self._reading + (given - 1) * self._writing
        return [Continuation((1,) * given, stopped=given < tokens)]

    def stops_on(self, token: int) -> bool:
        return False

    def stop_ids(self) -> frozenset[int] | None:
        return None


@pytest.mark.parametrize("ends_after", [2, 30, OUTPUT_TOKENS + 1])
def test_a_prompts_tokens_do_not_count_as_an_answers(ends_after: int) -> None:
    session = Metered(0.25, 4.0, ends_after)
    assert measure(session, lambda: session.now) == (4.0, 0.25)


def test_an_answer_that_ends_at_once_says_nothing() -> None:
    session = Metered(0.25, 4.0, 1)
    assert measure(session, lambda: session.now) == (4.0, None)


def test_the_prompt_fits_the_context() -> None:
    longest = 0

    class Watched(Metered):
        def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
            nonlocal longest
            longest = max(longest, len(prompts[0]) + tokens)
            return super().generate(prompts, tokens)

    session = Watched(0.25, 4.0, OUTPUT_TOKENS)
    measure(session, lambda: session.now)
    assert longest <= PROMPT_TOKENS + OUTPUT_TOKENS


def test_artifacts_are_loaded_and_measured(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("qwen2")
    adapter = make_adapter(base)
    for name, format_, quant in (("one", "gguf", ("F16", "Q8_0")), ("two", "safetensors", ("fp32",))):
        export_to(tmp_path / name, base, adapter, format=format_, quant=quant, name="model")
    result = invoke("compare", tmp_path / "one", tmp_path / "two", "--speed", "--json")
    assert result.exit_code == 0, result.stderr
    found = {artifact["quant"]: artifact["speed"] for artifact in json.loads(result.stdout)["artifacts"]}
    assert {quant: speed["runtime"].split()[0] for quant, speed in found.items()} == {
        "F16": "llama-cpp-python", "Q8_0": "llama-cpp-python", "fp32": "transformers",
    }  # fmt: skip
    assert all(speed["prompt"] > 0 for speed in found.values())
