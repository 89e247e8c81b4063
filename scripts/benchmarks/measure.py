"""Run a command as its own process and measure what it took: time, memory, and the files it wrote.

Memory is resident memory with mapped pages counted, as the kernel keeps it (`ru_maxrss`, `VmHWM`). The kernel starts a
child's `ru_maxrss` at the resident size of the process that started it, so whoever imports this module should stay
small: neither torch nor numpy is imported here.
"""

from __future__ import annotations

import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05
FileKey = tuple[int, int]


class CommandFailedError(Exception):
    """A measured command ended with a status other than zero."""


@dataclass(frozen=True)
class Measurement:
    """What one command took.

    `peak_process_bytes` is the largest process of the tree, `peak_tree_bytes` the largest sum over the tree that a
    sample saw (pages that processes share are counted in each). `largest_temporary_bytes` is the largest file that a
    sample saw being written and that is not part of the output; `written_bytes` is all that was sent to the disk, so
    that a temporary file between two samples shows as well.
    """

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_process_bytes: int
    peak_tree_bytes: int
    largest_temporary_bytes: int
    largest_temporary: str
    written_bytes: int
    output_bytes: int

    @property
    def cpu_seconds(self) -> float:
        """User and system time together."""
        return self.user_seconds + self.system_seconds


def machine() -> str:
    """One line that says what the figures were measured on: processor, cores, memory."""
    model = _first_value(Path("/proc/cpuinfo"), "model name") or "unknown processor"
    memory = int((_first_value(Path("/proc/meminfo"), "MemTotal") or "0 kB").split()[0]) * 1024
    return f"{model}, {cores()} cores, {memory / 1e9:.1f} GB memory, Linux {os.uname().release}"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    return sum(entry.stat().st_size for entry in _files(path))


def warm(path: Path) -> None:
    """Read a file or folder once, so that every measured command finds it in the page cache."""
    for entry in _files(path):
        with entry.open("rb", buffering=0) as data:
            while data.read(1 << 24):
                pass


def run(
    command: Sequence[str], output: Path, scratch: Path, log: Path, environment: Mapping[str, str] | None = None
) -> Measurement:
    """Run a command and measure it.

    `output` is the file or folder that it makes; `scratch` an existing folder, given to it as TMPDIR and watched; `log`
    takes what it prints. Dirty pages are written back before the clock starts. Raises CommandFailedError.
    """
    os.sync()
    with log.open("wb") as sink:
        watcher = _Watcher((scratch, output.parent), ignored=_key(os.fstat(sink.fileno())))
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), "TMPDIR": str(scratch)},
        )
        watcher.start(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        watcher.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise CommandFailedError(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    largest, size = watcher.largest_temporary(output)
    return Measurement(
        wall_seconds=wall,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_process_bytes=max(usage.ru_maxrss * 1024, watcher.peak_process),
        peak_tree_bytes=watcher.peak_tree,
        largest_temporary_bytes=size,
        largest_temporary=largest,
        written_bytes=usage.ru_oublock * 512,
        output_bytes=size_of(output),
    )


class _Watcher:
    """Samples a process tree in a thread: resident memory, and the files that it writes."""

    def __init__(self, folders: Iterable[Path], ignored: FileKey) -> None:
        self._folders = tuple(folders)
        self._before = {key for key, _, _ in self._listed()} | {ignored}
        self._seen: dict[FileKey, tuple[int, str]] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.peak_process = 0
        self.peak_tree = 0

    def start(self, pid: int) -> None:
        """Begin to sample the process and its descendants."""
        self._thread = threading.Thread(target=self._watch, args=(pid,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling, with one last look at the watched folders."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._note(self._listed())

    def largest_temporary(self, output: Path) -> tuple[str, int]:
        """Name and size of the largest file seen that was not there before and is not in the output."""
        final = {_key(entry.stat()) for entry in _files(output)}
        others = [value for key, value in self._seen.items() if key not in final]
        size, name = max(others, default=(0, ""))
        return name, size

    def _watch(self, pid: int) -> None:
        while not self._stopped.is_set():
            tree = list(_descendants(pid))
            resident = [_resident(member) for member in tree]
            self.peak_process = max([self.peak_process, *(peak for peak, _ in resident)])
            self.peak_tree = max(self.peak_tree, sum(now for _, now in resident))
            for member in tree:
                self._note(_written_files(member))
            self._note(self._listed())
            self._stopped.wait(SAMPLE_SECONDS)

    def _listed(self) -> Iterator[tuple[FileKey, int, str]]:
        for folder in self._folders:
            for entry in _files(folder):
                try:
                    found = entry.stat()
                except OSError:
                    continue
                yield _key(found), found.st_size, entry.name

    def _note(self, found: Iterable[tuple[FileKey, int, str]]) -> None:
        for key, size, name in found:
            if key not in self._before:
                self._seen[key] = max(self._seen.get(key, (0, "")), (size, name))


def _key(found: os.stat_result) -> FileKey:
    """What stays the same when a file is renamed."""
    return found.st_dev, found.st_ino


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or every file under the folder; nothing where there is nothing."""
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names if Path(folder, name).is_file())


def _first_value(path: Path, name: str) -> str | None:
    """The value of the first `name : value` line of a /proc file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _descendants(pid: int) -> Iterator[int]:
    """A process and all processes below it."""
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii").split()
        except OSError:
            continue
        for child in children:
            yield from _descendants(int(child))


def _resident(pid: int) -> tuple[int, int]:
    """Peak and present resident bytes of a process, zero where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0, 0
    values = {line.partition(":")[0]: line.split() for line in lines if line.startswith(("VmHWM:", "VmRSS:"))}
    peak, now = (int(values[name][1]) * 1024 if name in values else 0 for name in ("VmHWM", "VmRSS"))
    return peak, now


def _written_files(pid: int) -> Iterator[tuple[FileKey, int, str]]:
    """The regular files that a process holds open for writing, deleted ones as well."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for descriptor in descriptors:
        try:
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if not stat.S_ISREG(found.st_mode):
                continue
            flags = _first_value(Path(f"/proc/{pid}/fdinfo/{descriptor}"), "flags") or "0"
            name = os.path.basename(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
        except OSError:
            continue
        if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
            yield _key(found), found.st_size, name
