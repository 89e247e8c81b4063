"""The staging folder by itself: locks, keys, journals, and what a kill at each of its steps leaves behind.

Journal, key and lock are ours alone: no other program reads them, so their only witness is the run that goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.artifact.durable import copy_durably, write_durably
from exporter.artifact.hashing import sha256
from exporter.artifact.staging import Staging
from exporter.errors import OutputExistsError, StagingInUseError, WriteError
from tests.folders import hashes, listing


class Killed(BaseException):
    """Stands for a SIGKILL: nothing between the raise and the test may handle it."""


def staged(out: Path, key: str = "key", content: str = "new", *, force: bool = False) -> Staging:
    staging = Staging(out, key, force=force)
    (staging.files / "model.bin").write_text(content)
    return staging


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_publishing_is_a_rename(out: Path) -> None:
    staging = staged(out)
    inode = staging.files.stat().st_ino
    assert listing(out.parent) == {
        ".out.staging",
        *(f".out.staging/{name}" for name in ("files", "files/model.bin", "key", "journal", "lock")),
    }
    assert staging.publish() == out
    assert out.stat().st_ino == inode
    assert listing(out.parent) == {"out", "out/model.bin"}


def test_output_that_appears_meanwhile_is_not_replaced(out: Path) -> None:
    staging = staged(out)
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputExistsError):
        staging.publish()
    assert listing(out) == {"precious"}
    staging.close()


def test_rejected_files_leave_the_output_alone(out: Path) -> None:
    staged(out, content="old").publish()
    staging = staged(out, force=True)
    assert staging.reject() == out.parent / "out.rejected"
    again = staged(out, content="newer", force=True)
    again.reject()
    assert (out / "model.bin").read_text() == "old"
    assert (out.parent / "out.rejected" / "model.bin").read_text() == "newer"
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.rejected"}


def test_one_run_at_a_time(out: Path) -> None:
    first = staged(out)
    for key in ("key", "another key"):
        with pytest.raises(StagingInUseError):
            Staging(out, key)
    assert listing(first.files) == {"model.bin"}
    first.close()
    second = Staging(out, "key")
    assert second.resumed
    second.close()
    second.close()


def test_runs_to_other_outputs_do_not_meet(out: Path) -> None:
    first, second = staged(out), staged(out.with_name("out2"), content="other")
    first.publish()
    assert (second.publish() / "model.bin").read_text() == "other"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError):
        Staging(tmp_path / "file" / "out", "key")


# --- going on --------------------------------------------------------------------------------------------------------


def test_same_key_goes_on(out: Path) -> None:
    first = staged(out)
    assert not first.resumed
    first.record([("gguf Q8_0", "a", "00000001"), ("gguf Q8_0", "b", None), ("gguf Q4_0", "a", "00000002")])
    first.close()
    second = Staging(out, "key")
    assert second.resumed
    assert second.done("gguf Q8_0") == {"a", "b"}
    assert second.done("gguf Q4_0") == {"a"}
    assert second.done("gguf F16") == set()
    assert second.checksums("gguf Q8_0") == {"a": "00000001"}
    assert second.checksums("gguf Q4_0") == {"a": "00000002"}
    assert (second.files / "model.bin").read_text() == "new"
    second.close()


def test_another_key_starts_anew(out: Path) -> None:
    first = staged(out)
    first.record([("gguf Q8_0", "a", None)])
    first.close()
    second = Staging(out, "another key")
    assert not second.resumed
    assert second.done("gguf Q8_0") == set()
    assert listing(second.files) == set()
    second.close()
    third = Staging(out, "key")
    assert not third.resumed
    third.close()


def test_journal_cut_anywhere_names_only_what_was_recorded(out: Path) -> None:
    names = ["model.layers.0.mlp", 'with "quotes"', "with\nbreak", "é"]
    first = staged(out)
    for name in names:
        first.record([("a b", name, None)])
    first.close()
    journal = out.parent / ".out.staging" / "journal"
    whole = journal.read_bytes()
    before: set[str] = set()
    for end in range(len(whole) + 1):
        journal.write_bytes(whole[:end])
        staging = Staging(out, "key")
        done = staging.done("a b")
        assert before <= done <= set(names)
        # Recording goes on behind whatever half a line there is.
        staging.record([("a b", "next", None)])
        staging.close()
        again = Staging(out, "key")
        assert again.done("a b") == done | {"next"}
        again.close()
        before = done
    assert before == set(names)


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the given call (from 1 on) of a function, and every later one, raise before it does anything."""
    original: Callable[..., object] = getattr(owner, name)
    calls = 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def close_as_the_kernel_does(file: Path) -> None:
    """Close every descriptor of a file, as the end of a process would."""
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}") == str(file):
            os.close(int(name))


def test_killed_while_an_older_run_is_cleared_away(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal must not outlive its files, or the next run of its kind publishes holes."""
    first = staged(out)
    first.record([("gguf Q8_0", "a", None)])
    first.close()

    def cleared_halfway(folder: Path, **_: object) -> None:
        (Path(folder) / "model.bin").unlink()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cleared_halfway)
        with pytest.raises(Killed):
            Staging(out, "another key")
    close_as_the_kernel_does(out.parent / ".out.staging" / "lock")
    again = Staging(out, "key")
    assert not again.resumed or not again.done("gguf Q8_0")
    again.close()


@pytest.mark.parametrize("call", [1, 2])
def test_killed_while_an_output_is_replaced(out: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    staged(out, content="old").publish()
    old = hashes(out)
    with monkeypatch.context() as patched:
        staging = staged(out, force=True)
        kill_at(patched, Path, "rename", call)
        with pytest.raises(Killed):
            staging.publish()
    staging.close()
    # Whatever is there is whole, and the next run gets through, even if the plan or the output have changed meanwhile.
    assert not out.exists() or hashes(out) == old
    out.mkdir(exist_ok=True)
    (out / "of the user").write_text("x")
    staged(out, "another key", "newer", force=True).publish()
    assert listing(out.parent) == {"out", "out/model.bin"}
    assert (out / "model.bin").read_text() == "newer"


def test_killed_after_publishing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = staged(out)
    with monkeypatch.context() as patched:
        kill_at(patched, shutil, "rmtree", 1)
        with pytest.raises(Killed):
            staging.publish()
    staging.close()
    assert (out / "model.bin").read_text() == "new"
    with pytest.raises(OutputExistsError):
        Staging(out, "key")
    staged(out, content="newer", force=True).publish()
    assert listing(out.parent) == {"out", "out/model.bin"}


# --- small files -----------------------------------------------------------------------------------------------------


def test_small_files_are_written_whole(tmp_path: Path) -> None:
    write_durably(tmp_path / "a", b"longer content")
    write_durably(tmp_path / "a", b"short")
    assert (tmp_path / "a").read_bytes() == b"short"
    os.chmod(tmp_path / "a", 0o400)
    os.utime(tmp_path / "a", (1, 1))
    copy_durably(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"short"
    # Neither the time nor the mode of an input may get into an output.
    assert (tmp_path / "b").stat().st_mtime > 1
    assert (tmp_path / "b").stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
def test_hash_is_of_the_whole_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    assert sha256(file) == hashes(tmp_path)["file"]
