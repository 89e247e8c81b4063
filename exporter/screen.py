"""The screen: plan, progress and verdict with rich on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
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
from rich.table import Table

from exporter.errors import ExporterError
from exporter.reporter import Reporter
from exporter.units import duration, size
from exporter.verdict_table import show_verdicts

if TYPE_CHECKING:
    from exporter.calibration import Windows
    from exporter.pipeline import ExportResult
    from exporter.plan import ExportPlan

# Columns of a terminal that is none: wide enough that no table is cut.
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
    """An error as four lines: what, found, expected, what to do."""
    word = {2: "refused", 3: "failed the gate"}.get(error.exit_status, "failed")
    console.print(f"[bold red]{word}[/]  {escape(error.thing)}", highlight=False, soft_wrap=True)
    for label, text in (("found", error.found), ("expected", error.expected), ("do", error.remedy)):
        console.print(f"  [dim]{label:<9}[/]{escape(text)}", highlight=False, soft_wrap=True)


def show_plan(console: Console, plan: ExportPlan) -> None:
    """The plan: what goes in, a table of files with their types, what it takes, and what will judge it."""
    model = plan.model
    architecture = (model.config.get("architectures") or ["unknown"])[0]
    console.print(
        f"[bold]{escape(model.name)}[/]  {architecture}, {model.parameters / 1e6:,.1f} M parameters, "
        f"{len(model.tensors)} tensors, {size(plan.input_bytes)}",
        highlight=False,
    )
    for source, adapter in zip(plan.adapters, model.adapters, strict=True):
        ranks = sorted({update.rank for update in adapter.updates.values()})
        console.print(
            f"  adapter {escape(source.name)}: rank {', '.join(map(str, ranks))} on {len(adapter.updates)} tensors",
            highlight=False,
        )
    console.print(_files_table(plan))
    for artifact in plan.artifacts:
        for note in artifact.notes:
            console.print(
                f"  [yellow]note[/] {escape(artifact.label)}: {escape(note)}", highlight=False, soft_wrap=True
            )
    if tokens := _tokens(plan):
        console.print(f"  {tokens}", highlight=False)
    if plan.pack:
        pack, first = plan.pack, len(plan.pack.windows.ids)
        drawn = f" with {pack.most - first} windows that may be drawn" if pack.most > first else ""
        kept = f"{escape(str(pack.out))}, states in {pack.dtype}, at most {size(pack.nbytes)}{drawn}"
        console.print(f"  reference kept in {kept}", highlight=False, soft_wrap=True)
    memory = f"memory {size(plan.merge_bytes)} to merge"
    if plan.walk_bytes:
        memory += f", {size(plan.walk_bytes)} to walk through the layers"
    console.print(
        f"  {memory} · disk {size(plan.disk_bytes)} · about {duration(plan.seconds)} on {plan.threads} threads",
        highlight=False,
    )


def _tokens(plan: ExportPlan) -> str:
    """What is scored and what is calibrated on."""
    parts = []
    if evaluation := plan.tokens.evaluation:
        parts.append(f"evaluation {len(evaluation.ids)} windows of {evaluation.n_ctx} tokens")
    if calibration := plan.tokens.calibration:
        parts.append(f"calibration {len(calibration.ids)} windows of {calibration.window} tokens")
    source = plan.tokens.evaluation or plan.tokens.calibration
    return f"{', '.join(parts)} of {escape(source.source)}" if source else ""


def _files_table(plan: ExportPlan) -> Table:
    from exporter.plan_json import type_shares

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("file", "size", "types by bytes", "verified by"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for folder in plan.folders:
        for artifact in folder.artifacts:
            shares = ", ".join(f"{kind} {entry['share']:.0%}" for kind, entry in type_shares(artifact).items())
            judge = folder.runtimes.get(artifact.label, "nothing")
            files = {file.name: file.nbytes for file in artifact.files} | dict(artifact.made)
            for index, (name, nbytes) in enumerate(files.items()):
                first = index == 0
                table.add_row(
                    escape(f"{folder.out}/{name}"),
                    size(nbytes),
                    shares if first else "",
                    judge if first else "",
                )
            rest = [len(content) for content in artifact.documents.values()]
            rest += [path.stat().st_size for path in artifact.copies.values()]
            if rest:
                table.add_row(
                    f"[dim]{len(rest)} small file{'s' * (len(rest) > 1)} beside it[/]", size(sum(rest)), "", ""
                )
    return table


class Screen(Reporter):
    """Draws on a terminal; prints a line a step elsewhere.

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
        """See `Reporter`. Where layers are counted, bytes are not."""
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

    def finished(self, result: ExportResult) -> None:
        """See `Reporter`."""
        if not self._quiet:
            show_verdicts(self._console, result)

    def _outcome(self) -> str:
        seconds = f"{time.monotonic() - self._started:.1f} s"
        if self._layers or self._total:
            return f"{f'{self._layers} layers' if self._layers else f'{self._total} windows'} in {seconds}"
        return seconds

    def _begin(self, what: str, total: int, *figures: ProgressColumn) -> None:
        """End what came before, and start a bar; `figures` stand between it and the time left."""
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
