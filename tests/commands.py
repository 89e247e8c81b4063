"""The command line, in this process where that is enough and as a process of its own where a process is the point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

from exporter.cli.app import app


def invoke(*arguments: str | Path) -> Result:
    """Run a command in this process. Anything but an orderly exit is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, program: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own.

    Args:
        arguments: of the command line.
        env: added to the environment.
        cwd: where it runs.
        program: Python source to run in place of `python -m exporter`.
    """
    return subprocess.run(
        command(*arguments, program=program),
        env=environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def command(*arguments: str | Path, program: str | None = None) -> list[str]:
    """The command line as a list, for `subprocess`."""
    start = ["-m", "exporter"] if program is None else ["-c", program]
    return [sys.executable, *start, *map(str, arguments)]


def environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command: without proxies, which would stand before a server on loopback, or a hub's cache.

    The cache's place is set for the whole process by gptqmodel, which peft imports wherever it is installed.
    """
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key != "HF_HUB_CACHE"}
    return kept | dict(added or {})
