"""What a plan says of vLLM on a CPU, and the bits by which a runtime is chosen there."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.backends.gptq.backend import GptqBackend
from exporter.merge.model import MergedModel
from exporter.runtimes.artifact_facts import PackedWeights
from exporter.runtimes.vllm.server import PLUGIN
from tests.merged import merged_model
from tests.models import make_base
from tests.tour.walk.test_walk import make_experts

UNPACKED = f", on the CPU with our plugin {PLUGIN} alone, which unpacks 8 bits to 16 when loading"
ATTENTION = r".*\.self_attn\..*"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    return merged_model(make_base(tmp_path_factory.mktemp("dense") / "base", "qwen2"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    return merged_model(make_experts(tmp_path_factory.mktemp("experts") / "base", hidden=128))


def plan_of(model: MergedModel, bits: int, attention: int) -> Any:
    overrides = {ATTENTION: {"bits": attention}} if attention != bits else {}
    return GptqBackend().plan(model, f"gptq-int{bits}-g32", {"overrides": overrides})


@pytest.mark.parametrize(
    ("bits", "attention", "words"),
    [(4, 4, ", on the CPU too"), (8, 8, UNPACKED), (4, 8, UNPACKED), (8, 4, UNPACKED)],
)
def test_what_serves_it_on_a_cpu(dense: MergedModel, bits: int, attention: int, words: str) -> None:
    plan = plan_of(dense, bits, attention)
    assert plan.packed == {PackedWeights("gptq", bits), PackedWeights("gptq", attention)}
    assert plan.notes[0].startswith("vLLM serves it")
    assert plan.notes[0].endswith(words)


@pytest.mark.parametrize(
    ("bits", "attention", "words"),
    [
        (4, 4, ", on the CPU too, and experts on processors with AMX"),
        (4, 8, f"{UNPACKED}, and experts on processors with AMX"),
        (8, 8, "; not on the CPU, where it has no kernel for experts of 8 bits"),
        (8, 4, "; not on the CPU, where it has no kernel for experts of 8 bits"),
    ],
)
def test_bits_of_experts_are_told_from_those_beside(
    experts: MergedModel, bits: int, attention: int, words: str
) -> None:
    plan = plan_of(experts, bits, attention)
    # Some layers have no experts, and theirs are packed with as many bits.
    beside = {PackedWeights("gptq", bits), PackedWeights("gptq", attention)}
    assert plan.packed == {*beside, PackedWeights("gptq", bits, experts=True)}
    assert plan.notes[0].endswith(words)
