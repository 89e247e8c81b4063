"""Bases and adapters by folder and by hub id, the latter against a stand-in hub on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from exporter.errors import HubError, MissingFileError, RefusalError
from exporter.inputs.sources import resolve_adapter, resolve_base
from tests.commands import run
from tests.folders import copy, listing
from tests.hub import Hub, commit, serve

Make = Callable[..., Path]

BASE_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
}
# Files that hub repositories carry and that no export needs.
BALLAST = (
    "pytorch_model.bin",
    "onnx/model.onnx",
    "original/consolidated.00.safetensors",
    "checkpoint-5/model.safetensors",
    "tf_model.h5",
    "logs/events.out",
    "model.gguf",
    "training_args.bin",
)


@pytest.fixture(scope="module")
def hub(make_base: Make, make_adapter: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    base = copy(make_base("qwen3", max_shard_size="100KB"), folder / "base")
    adapter = copy(make_adapter(make_base("qwen3", max_shard_size="100KB")), folder / "adapter")
    for repository in (base, adapter):
        for name in BALLAST:
            (repository / name).parent.mkdir(exist_ok=True)
            (repository / name).write_bytes(b"ballast")
        (repository / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (repository / "LICENSE").write_text("Apache-2.0")
    other = make_base("qwen3", layers=1)
    with serve(Hub({"org/base": {"main": base, "v1": other}, "org/lora": {"main": adapter}})) as served:
        yield served


def plan(
    hub_url: str, cache: Path, base: str, *adapters: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """`exporter plan --json` against a hub, in a process of its own since the endpoint is read at import."""
    flags = [part for adapter in adapters for part in ("--adapter", adapter)]
    out = cache.parent / "out"
    output = ("--format", "safetensors", "--out", str(out), "--no-verify", "--json")
    result = run(
        "plan",
        "--base",
        base,
        *flags,
        *output,
        env={"HF_ENDPOINT": hub_url, "HF_HOME": str(cache), "HF_HUB_ETAG_TIMEOUT": "3"} | env,
    )
    assert "Traceback" not in result.stderr
    return result, json.loads(result.stdout) if result.returncode == 0 else None


def test_export_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    out = tmp_path / "out"
    arguments = ("--base", "org/base", "--adapter", "org/lora", "--format", "safetensors", "--out", out)
    result = run("export", *arguments, "--no-verify", "--json", "--quiet", env=env)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    base, adapter = manifest["inputs"]
    assert (base["hub_id"], base["revision"]) == ("org/base", commit("org/base", "main"))
    assert (adapter["hub_id"], adapter["revision"]) == ("org/lora", commit("org/lora", "main"))
    assert manifest["name"] == "base-lora"
    shards = {file["name"] for file in base["files"] if file["name"].startswith("model-")}
    assert len(shards) > 1
    assert hub.fetched("org/base") == BASE_FILES | shards
    assert hub.fetched("org/lora") == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (out / "export.json").read_text()


def test_revision_and_cache(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    result, planned = plan(hub.url, cache, "org/base@v1")
    assert result.returncode == 0, result.stderr
    assert planned["base"]["revision"] == commit("org/base", "v1")
    assert planned["base"]["name"] == "base"
    assert planned["model"]["tensors"] == 13  # the one with a single layer
    # The same from the cache, with the hub out of reach, by name and by commit.
    for revision in ("v1", commit("org/base", "v1")):
        again, replanned = plan("http://127.0.0.1:9", cache, f"org/base@{revision}", HF_HUB_OFFLINE="1")
        assert again.returncode == 0, again.stderr
        assert replanned == planned


@pytest.mark.parametrize("source", ["org/nothing", "org/base@v9"])
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, source: str) -> None:
    result, _ = plan(hub.url, tmp_path / "cache", source)
    assert result.returncode == 2, result.stderr
    assert source in result.stderr
    assert "out" not in listing(tmp_path)


def hang_up(connections: socket.socket) -> None:
    while True:
        try:
            connection, _ = connections.accept()
        except OSError:
            return
        connection.close()


def test_hub_that_cannot_be_used(hub: Hub, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as rude:
        threading.Thread(target=hang_up, args=(rude,), daemon=True).start()
        endpoints = [f"http://127.0.0.1:{rude.getsockname()[1]}", "hub.example", "http://127.0.0.1:9"]
        for endpoint in endpoints:
            result, _ = plan(endpoint, tmp_path / "cache", "org/base")
            assert result.returncode == 2, (endpoint, result.stderr)
            assert "org/base" in result.stderr
        rude.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("status", [401, 500])
def test_hub_that_says_no(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.status = status
    try:
        result, _ = plan(hub.url, tmp_path / "cache", "org/base")
    finally:
        hub.status = None
    assert result.returncode == 2, result.stderr
    assert "org/base" in result.stderr


# --- without a hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: Any, **options: Any) -> str:
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)


def test_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("org/base", "./org/base", str(tmp_path / "org" / "base") + "/", "~/org/base"):
        found = resolve_base(source)
        assert found.folder.resolve() == tmp_path / "org" / "base"
        assert (found.name, found.hub_id, found.revision) == ("base", None, None)


NEITHER = ["", ".nothing", "./nothing", "../nothing", "/nothing", "~/nothing", "~nobody-of-that-name/x", "a/b/c", "a b"]
NEITHER += ["a/b@", "@main", "a/b@c d", "a\0b", "C:\\models\\x"]


@pytest.mark.parametrize("source", NEITHER)
@pytest.mark.parametrize("resolve", [resolve_base, resolve_adapter])
def test_what_is_neither_folder_nor_hub_id(no_hub: None, resolve: Callable[[str], Any], source: str) -> None:
    with pytest.raises(RefusalError) as caught:
        resolve(source)
    assert isinstance(caught.value, MissingFileError | HubError)


def test_file_is_no_folder(tmp_path: Path, no_hub: None) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingFileError):
        resolve_base(str(tmp_path / "model.gguf"))
