"""The consoles on stderr and stdout, and the look of errors on them."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from exporter.errors import ExporterError

# Columns where the output is no terminal: wide enough that no table is cut.
PLAIN_WIDTH = 140


def stderr_console() -> Console:
    """The console for diagnostics."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=PLAIN_WIDTH)


def stdout_console() -> Console:
    """The console for what was asked for."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def show_error(console: Console, error: ExporterError) -> None:
    """Print an error as four lines: the thing, found, expected, what to do."""
    word = {2: "refused", 3: "failed the gate"}.get(error.exit_status, "failed")
    console.print(f"[bold red]{word}[/]  {escape(error.thing)}", highlight=False, soft_wrap=True)
    for label, text in (("found", error.found), ("expected", error.expected), ("do", error.remedy)):
        console.print(f"  [dim]{label:<9}[/]{escape(text)}", highlight=False, soft_wrap=True)
