"""Shows plan, progress and verdict on stderr: with rich on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from exporter.cli.plan_table import show_plan
from exporter.plan.reporter import Reporter
from exporter.units import size

if TYPE_CHECKING:
    from exporter.plan.export_plan import ExportPlan
    from exporter.tokens.windows import Windows


class Screen(Reporter):
    """Draws progress bars on a terminal, and prints one line a step elsewhere.

    Args:
        console: where to; stderr.
        quiet: print nothing but errors.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._live = console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._total = 0
        self._layers = self._input = 0
        self._by_layer = False
        self._what = ""

    def planned(self, plan: ExportPlan) -> None:
        """See `Reporter`."""
        if not self._quiet:
            show_plan(self._console, plan)

    def touring(self, plan: ExportPlan, device: str, *, resumed: bool) -> None:
        """See `Reporter`."""
        how = "going on with an earlier run" if resumed else f"merging on {device}"
        self._input, self._by_layer = plan.input_bytes, plan.walks
        if plan.walks:
            self._begin(f"{how}, layer by layer", 0, MofNCompleteColumn(), TextColumn("layers"))
        else:
            self._begin(how, plan.input_bytes, DownloadColumn(), TransferSpeedColumn())

    def read(self, nbytes: int) -> None:
        """See `Reporter`. Counts bytes only where layers are not counted."""
        if not self._by_layer:
            self._advance(nbytes)

    def toured(self) -> None:
        """See `Reporter`."""
        seconds = time.monotonic() - self._started
        layers = f"{self._layers} layers, " if self._layers else ""
        self._end(f"{layers}{size(self._input)} in {seconds:.1f} s, {size(self._input / max(seconds, 1e-9))}/s")

    def walking(self, windows: Windows) -> None:
        """See `Reporter`."""
        self._begin(f"walking reference, {len(windows.ids)} windows", 0, MofNCompleteColumn(), TextColumn("layers"))

    def layer(self, done: int, layers: int) -> None:
        """See `Reporter`."""
        self._layers = layers
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=layers)

    def scoring(self, what: str, windows: Windows) -> None:
        """See `Reporter`."""
        self._begin(f"scoring {what}", len(windows.ids), MofNCompleteColumn(), TextColumn("windows"))

    def doing(self, what: str) -> None:
        """See `Reporter`."""
        self._begin(what, 0)

    def window(self, count: int) -> None:
        """See `Reporter`."""
        self._advance(count)

    def scored(self) -> None:
        """See `Reporter`."""
        self._end(self._outcome())

    def _outcome(self) -> str:
        seconds = f"{time.monotonic() - self._started:.1f} s"
        if self._layers or self._total:
            return f"{f'{self._layers} layers' if self._layers else f'{self._total} windows'} in {seconds}"
        return seconds

    def _begin(self, what: str, total: int, *figures: ProgressColumn) -> None:
        """End the bar before, and start a new one. `figures` stand between the bar and the time left."""
        if self._what:
            self._end(self._outcome())
        self._started, self._total, self._what, self._layers = time.monotonic(), total, what, 0
        if self._live:
            columns = (TextColumn("{task.description}"), BarColumn(), *figures, TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task(what, total=total)
            self._progress.start()

    def _advance(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def _end(self, outcome: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if not self._quiet and not self._live:
            self._console.print(f"{self._what}: {outcome}", highlight=False)
        self._what = ""

    def stop(self) -> None:
        """Take the progress bar down, before an error is printed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
