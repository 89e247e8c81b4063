"""The staging folder: a run writes everything beside the target, makes it durable, and renames it at the end.

A run that is killed leaves only the staging folder, whose name starts with a dot. It holds a key of the plan and a
journal of the tensors that are on the disk. A later run with the same plan goes on from there; any other starts anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from exporter.artifact.durable import sync_folder, sync_tree, write_durably
from exporter.errors import OutputExistsError, StagingInUseError, WriteError


class Staging:
    """One staging folder, locked while it is open.

    Attributes:
        out: the folder that publishing creates.
        key: identifies the plan that it is for.
        files: the folder of the artifact's files.
        scratch: the folder of files that only a resumed run needs; it is removed with the staging folder.
        resumed: whether an earlier run's work was found and fits the plan.
    """

    def __init__(self, out: Path, key: str, *, force: bool = False) -> None:
        self.out = out
        self.key = key
        self._folder = out.parent / f".{out.name}.staging"
        self.files = self._folder / "files"
        self.scratch = self._folder / "scratch"
        self._force = force
        _refuse_existing(out, force)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(
                str(out), found=str(error), expected="a folder that can be made", remedy="Choose another --out."
            ) from None
        self._lock = self._acquire()
        try:
            self.resumed = self._fits(key)
            if not self.resumed:
                self._reset(key)
            self._done = self._read_journal()
            self._journal = (self._folder / "journal").open("a", encoding="utf-8")
        except OSError:
            os.close(self._lock)
            raise

    def _acquire(self) -> int:
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StagingInUseError(
                str(self._folder),
                found="another run that writes to this output",
                expected="one run at a time",
                remedy="Wait until that run ends, or choose another --out.",
            ) from None
        return lock

    def _fits(self, key: str) -> bool:
        stored = self._folder / "key"
        return stored.is_file() and stored.read_text(encoding="utf-8") == key and self.files.is_dir()

    def _reset(self, key: str) -> None:
        # The key goes first, as no run trusts a journal without one: a kill leaves none that vouches for lost files.
        (self._folder / "key").unlink(missing_ok=True)
        (self._folder / "journal").unlink(missing_ok=True)
        sync_folder(self._folder)
        shutil.rmtree(self.files, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.files.mkdir()
        write_durably(self._folder / "key", key.encode())

    def _read_journal(self) -> dict[tuple[str, str], str | None]:
        done: dict[tuple[str, str], str | None] = {}
        journal = self._folder / "journal"
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else ():
            try:
                artifact, tensor, checksum = json.loads(line)
            except ValueError:
                # The last line of a run that was killed in the middle of it.
                continue
            done[artifact, tensor] = checksum
        return done

    def done(self, artifact: str) -> set[str]:
        """Names of an artifact's tensors that are on the disk, written by this run or an earlier one."""
        return {tensor for label, tensor in self._done if label == artifact}

    def checksums(self, artifact: str) -> dict[str, str]:
        """Checksums of an artifact's finished tensors that have one, by name."""
        return {tensor: found for (label, tensor), found in self._done.items() if label == artifact and found}

    def record(self, entries: Iterable[tuple[str, str, str | None]]) -> None:
        """Note tensors as done, by artifact, name and checksum (if it has one).

        Their data must be on the disk already."""
        noted = list(entries)
        # A leading newline closes whatever half a line a killed run left.
        self._journal.write("\n" + "\n".join(json.dumps(entry) for entry in noted) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._done |= {(artifact, tensor): checksum for artifact, tensor, checksum in noted}

    def publish(self) -> Path:
        """Sync everything and rename the files to the output folder."""
        self._move(self.out, replace=self._force)
        return self.out

    def reject(self) -> Path:
        """Keep the files under `OUT.rejected`, in place of an older rejected folder. The output path stays as it is."""
        target = self.out.parent / f"{self.out.name}.rejected"
        self._move(target, replace=True)
        return target

    def discard(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock and keep the folder for the next run."""
        self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _move(self, target: Path, *, replace: bool) -> None:
        sync_tree(self.files)
        aside = self._folder / "replaced"
        if replace and os.path.lexists(target):
            # What a run that was killed between the two renames had put aside.
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink(missing_ok=True)
            target.rename(aside)
        else:
            _refuse_existing(target, force=False)
        self.files.rename(target)
        sync_folder(target.parent)
        self.discard()


def _refuse_existing(out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise OutputExistsError(
            str(out),
            found="a file or folder",
            expected="a path that does not exist yet",
            remedy="Choose another --out, or use --force.",
        )
