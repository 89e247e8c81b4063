"""A server process that cannot outlive this one. Standard library only: this file also runs by itself, as the guard.

Between us and the server stands a guard, a small process in a session of its own. It starts the server and holds the
read end of a pipe whose write end only we have. When the pipe closes, because `stop` closed it or because this process
is gone (an exception, Ctrl-C, SIGTERM and SIGKILL alike), the guard ends the server and everything that it started.
On Linux it is the one that orphans are handed to, so that engines which outlive their server, or left its process
group, are found as well. Should the guard itself be killed, the kernel kills the server, and `stop` what is left.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType

LOG_LINES = 1000
# What a server gets to end by itself, which takes 2 s; after that, each harder way of telling what is left of it.
SERVER_SECONDS = 6.0
REST_SECONDS = 4.0
# The guard's first line: the server's process group, and the scratch folder.
HEADING = "exporter-guard"


class ServerProcess:
    """A command in a process of its own, from construction to `stop`, or to the end of this process.

    Args:
        command: program and arguments; its working directory and TMPDIR are a scratch folder that goes with it.
        environment: the whole environment of the command.

    Raises:
        OSError: the guard could not be started. A command that cannot be started ends with status 127.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._started: tuple[int, Path] | None = None
        self._guard = subprocess.Popen(
            [sys.executable, "-I", __file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def lines(self) -> list[str]:
        """The last lines that the command wrote, stdout and stderr together; at most `LOG_LINES`."""
        return list(self._lines)

    def status(self) -> int | None:
        """Exit status of the command, 128 + the signal that ended it, or None while anything of it runs."""
        return self._guard.poll()

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Ask until the answer is yes. False: the command has ended, or the time is over (see `status`)."""
        deadline = time.monotonic() + seconds
        while self.status() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.1)
        if self.status() is not None:
            # Whoever asks for `lines` now wants the last of them.
            self._follower.join(REST_SECONDS)
        return False

    def stop(self) -> None:
        """End the command and everything that it started; when this returns, none of it runs."""
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.close()
        try:
            self._guard.wait(SERVER_SECONDS + 4 * REST_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
        if self._guard.wait() < 0 and self._started is not None:
            group, scratch = self._started
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(group, number)
                _wait(lambda: _group_runs(group), REST_SECONDS)
            shutil.rmtree(scratch, ignore_errors=True)
        self._follower.join(REST_SECONDS)
        if not self._follower.is_alive():
            self._guard.stdout.close()

    def _follow(self) -> None:
        assert self._guard.stdout is not None
        for raw in self._guard.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            if self._started is None and line.startswith(HEADING):
                _, group, scratch = line.split(" ", 2)
                self._started = int(group), Path(scratch)
            else:
                self._lines.append(line)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- the guard's side ------------------------------------------------------------------------------------------------

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _guard(command: Sequence[str]) -> int:
    """Run a command until it ends or standard input closes, then end what is left of it."""
    parent, asked = os.getppid(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="exporter-serve-", ignore_cleanup_errors=True) as scratch:
        try:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                cwd=scratch,
                env=os.environ | {"TMPDIR": scratch},
                process_group=0,
                preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0),
            )
        except OSError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            return 127
        print(HEADING, server.pid, scratch, flush=True)
        # A child that was forked off our parent may hold the pipe open: the parent's number tells as well.
        while server.poll() is None and not asked.is_set() and os.getppid() == parent:
            if select.select([sys.stdin], [], [], 0.2)[0]:
                break
        return _end(server)


def _end(server: subprocess.Popen[bytes]) -> int:
    """End a server and everything that it started: politely, then not. Returns its exit status, as a shell gives it."""
    if _left(server) and server.returncode is None:
        # It ends its engines itself.
        server.terminate()
        _wait(lambda: _left(server) and server.returncode is None, SERVER_SECONDS)
    for number, spared in ((signal.SIGTERM, True), (signal.SIGKILL, True), (signal.SIGKILL, False)):
        for pid in _left(server):
            if not (spared and _cleans_up(pid)):
                with suppress(ProcessLookupError):
                    (os.kill if sys.platform == "linux" else os.killpg)(pid, number)
        _wait(lambda: bool(_left(server)), REST_SECONDS)
    status = server.returncode
    return 1 if status is None else status if status >= 0 else 128 - status


def _cleans_up(pid: int) -> bool:
    """Whether a process is a resource tracker of multiprocessing, which removes shared memory once its users ended."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _wait(while_true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while while_true() and time.monotonic() < deadline:
        time.sleep(0.05)


def _left(server: subprocess.Popen[bytes]) -> set[int]:
    """What still runs: on Linux all descendants of the guard, elsewhere the process group of the server."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == server.pid:
                server.returncode = os.waitstatus_to_exitcode(ended[1])
    if sys.platform == "linux":
        return _descendants(os.getpid())
    else:
        return {server.pid} if _group_runs(server.pid) else set()


def _group_runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _descendants(pid: int) -> set[int]:
    """Children, theirs, and so on (proc(5), /proc/pid/task/tid/children)."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found.update(map(int, file.read_text().split()))
    return found.union(*map(_descendants, found))


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))


# The process, the level, the time and the source line stand before what is said.
_PREFIX = re.compile(r"^(\(\S+( pid=\d+)?\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b(: |$)|^Value error, |^\S+: error: ")
_INVALID = re.compile(r"ValidationError: \d+ validation error")
# What the outer processes say when an inner one has failed: true, and no help.
_ECHO = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|See root cause above")


def last_words(lines: Sequence[str]) -> list[str]:
    """What a server's log says of its end: its exceptions, or failing that its last lines; three at most."""
    return exceptions(lines) or [text[:300] for line in lines if (text := _PREFIX.sub("", line).strip())][-3:]


def exceptions(lines: Sequence[str]) -> list[str]:
    """The last exceptions in a server's log, three at most, each once, without vLLM's prefix, cut to 300 characters."""
    texts = [text for line in lines if (text := _PREFIX.sub("", line).strip())]
    # pydantic names the failed class first, and what is wrong in the line after.
    texts = [after if _INVALID.search(text) and after else text for text, after in pairwise([*texts, ""])]
    found = list(dict.fromkeys(text for text in texts if _EXCEPTION.search(text)))
    return [text[:300] for text in ([text for text in found if not _ECHO.search(text)] or found)[-3:]]
