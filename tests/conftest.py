"""Fixtures shared by all tests: the demo, and small models made in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# As the command line does, and before torch is imported: threads that spin for long make a shared machine slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest

from exporter.runtimes.vllm.runtime import ENVIRONMENT
from scripts.demo.make_demo import make_demo
from tests import models

ROOT = Path(__file__).resolve().parent.parent
# What was asked for outside of the tests.
SERVE_ENVIRONMENT = os.environ.get(ENVIRONMENT)


@pytest.fixture(scope="session", autouse=True)
def _no_server() -> Iterator[None]:
    """Model folders are scored by transformers, as where there is no vLLM: starting it takes 40 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, "")
        yield


@pytest.fixture(autouse=True)
def _server_if_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked `serve` find vLLM where any run would."""
    if request.node.get_closest_marker("serve"):
        if SERVE_ENVIRONMENT is None:
            monkeypatch.delenv(ENVIRONMENT)
        else:
            monkeypatch.setenv(ENVIRONMENT, SERVE_ENVIRONMENT)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo folder (base/, adapter/, demo.json), made once and kept in the cache."""
    folder = ROOT / ".cache" / "demo"
    if not (folder / "demo.json").is_file():
        make_demo(folder)
    return folder


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A maker of small bases, cached by its arguments; treat the folders as read-only (copy before changing one)."""
    cache: dict[str, Path] = {}

    def make(family: str = "qwen3", **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in cache:
            cache[key] = models.make_base(tmp_path_factory.mktemp(family) / "base", family, **options)
        return cache[key]

    return make


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A maker of random LoRA adapters for a base, cached by its arguments; likewise read-only."""
    cache: dict[str, Path] = {}

    def make(base: Path, **options: Any) -> Path:
        key = repr((base, sorted(options.items())))
        if key not in cache:
            cache[key] = models.make_adapter(base, tmp_path_factory.mktemp("lora") / "adapter", **options)
        return cache[key]

    return make
