"""Ends a command with an exit status, and with a message in place of a traceback."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

from exporter.errors import ExporterError


def guarded(console: Console, run: Callable[[], int], stop: Callable[[], None] = lambda: None) -> None:
    """Run a command. An error that a user can cause becomes a message and an exit status, never a traceback."""
    try:
        status = run()
    except KeyboardInterrupt:
        stop()
        console.print("interrupted; the same command goes on from what is staged", highlight=False)
        status = 130
    except (ExporterError, OSError, MemoryError, RuntimeError) as raised:
        from exporter.cli.consoles import show_error
        from exporter.plan.resources import out_of_memory

        stop()
        error = out_of_memory(raised) or raised
        if isinstance(error, ExporterError):
            show_error(console, error)
            status = error.exit_status
        elif isinstance(error, OSError):
            console.print(f"[bold red]failed[/]  {escape(str(error) or type(error).__name__)}", highlight=False)
            status = 1
        else:
            raise
    raise typer.Exit(status)
