"""The table at the end of a run: verdicts, figures and their limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.units import size

if TYPE_CHECKING:
    from exporter.pipeline.result import ExportResult
    from exporter.verify.gate import Verification
    from exporter.verify.scores.metrics import Comparison
    from exporter.verify.weights.check import WeightsResult


_NOTHING = "-"
_VERDICTS = {"passed": "[green]passed[/]", "failed": "[red]failed[/]", "undecided": "[yellow]undecided[/]"}


def show_verdicts(console: Console, result: ExportResult) -> None:
    """Print the verdict table, and where each output is."""
    for folder, outcome in zip(result.plan.folders, result.folders, strict=True):
        if outcome.verdicts:
            show_table(console, outcome.verdicts, {artifact.label: artifact.nbytes for artifact in folder.artifacts})
        show_notes(console, _solved_notes(outcome.manifest))
        if outcome.published:
            unverified = "" if outcome.verdicts else ", not verified"
            console.print(
                f"[bold green]published[/] {escape(str(outcome.path))}{unverified}", highlight=False, soft_wrap=True
            )
        else:
            kept = f"nothing at {escape(str(folder.out))}; the files are kept in {escape(str(outcome.path))}"
            console.print(f"[bold red]rejected[/]  {kept}", highlight=False, soft_wrap=True)
    if result.reference is not None:
        console.print(f"[bold]reference[/] {escape(str(result.reference))}", highlight=False, soft_wrap=True)


def _solved_notes(manifest: Mapping[str, Any]) -> list[str]:
    """A line for each artifact with matrices that were only rounded, or solved with more damping."""
    notes = []
    for artifact in manifest["artifacts"]:
        if solved := artifact["quantization"]:
            label, count = f"{artifact['format']} {artifact['quant']}", solved["matrices"]
            if rounded := len(solved["rounded"]):
                notes.append(f"{label}: {rounded} of {count} matrices saw too few calibration tokens and were rounded")
            if damped := len(solved["damped_more"]):
                notes.append(f"{label}: {damped} of {count} matrices had to be damped more than was asked for")
    return notes


def _interval(figures: Comparison) -> str:
    """The interval of the change. One window gives none."""
    return _NOTHING if figures.delta_interval is None else " … ".join(f"{end:+.2%}" for end in figures.delta_interval)


def _divergence(figures: Comparison) -> str:
    """The mean in nats. The top-k form is marked: it is a lower bound and must not be compared with the full one."""
    if coarse := figures.top_k_divergence:
        return f"top {coarse.k}: ≥ {coarse.mean:.5f}"
    return f"{figures.divergence.mean:.5f}" if figures.divergence else _NOTHING


def _limit(verdict: Verification, names: tuple[str, ...]) -> str:
    """The limit on the first of these figures that the artifact has."""
    for check in verdict.checks:
        if check.name in names:
            if not math.isfinite(check.limit):
                return _NOTHING
            return {"within": f"±{check.limit:.1%}", "at_most": f"{check.limit:g}", "at_least": f"{check.limit:.0%}"}[
                check.kind
            ]
    return _NOTHING


def show_table(
    console: Console, verdicts: Mapping[str, Verification], sizes: Mapping[str, int], *, by_reference: bool = False
) -> None:
    """Print a row for each artifact with its figures and limits, then its answers and the reasons why it did not pass.

    Args:
        console: where to.
        verdicts: by artifact label.
        sizes: bytes of each artifact, likewise.
        by_reference: whether a reference pack took the place of the trained model; the verdict then says so.
    """
    scored = [verdict.comparison for verdict in verdicts.values() if verdict.comparison]
    trained = ", ".join(
        f"{perplexity:.4f} over {tokens:,} predictions"
        for perplexity, tokens in dict.fromkeys((one.reference_perplexity, one.tokens_scored) for one in scored)
    )
    if scored:
        console.print(f"the trained model's perplexity is {trained}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1))
    columns = (
        "artifact",
        "size",
        "perplexity",
        "change",
        "95 % interval",
        "limit",
        "KL",
        "limit",
        "same top",
        "limit",
        "verdict",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("artifact", "verdict") else "right", no_wrap=True)
    for label, verdict in verdicts.items():
        said = _VERDICTS[verdict.verdict] + (" by reference" if by_reference else "")
        table.add_row(label, size(sizes[label]), *_figures(verdict), said)
    console.print(table)
    for label, verdict in verdicts.items():
        if verdict.answers is not None:
            console.print(f"  {escape(label)}: {verdict.answers.summary()}", highlight=False, soft_wrap=True)
        if verdict.weights is not None:
            console.print(f"  {escape(label)}: {_weights_line(verdict.weights)}", highlight=False, soft_wrap=True)
        for reason in verdict.broken:
            console.print(f"  [red]{escape(label)}[/]: {escape(reason)}", highlight=False, soft_wrap=True)


def _figures(verdict: Verification) -> tuple[str, ...]:
    """The cells between size and verdict."""
    figures = verdict.comparison
    if figures is None:
        return ("not scored", *[_NOTHING] * 7)
    return (
        f"{figures.perplexity:.4f}",
        f"{figures.delta:+.3%}",
        _interval(figures),
        _limit(verdict, ("perplexity",)),
        _divergence(figures),
        _limit(verdict, ("kl_divergence", "top_k_divergence")),
        f"{figures.same_top:.1%}",
        _limit(verdict, ("same_top",)),
    )


def show_notes(console: Console, notes: Sequence[str]) -> None:
    """A line a note."""
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False, soft_wrap=True)


def show_weights(
    console: Console, weights: Mapping[str, WeightsResult | None], broken: Mapping[str, Sequence[str]]
) -> None:
    """Print a line for each artifact that was compared and not scored, with its faults."""
    for label, found in weights.items():
        verdict = _VERDICTS["failed" if broken[label] else "passed"]
        line = "" if found is None else f", {_weights_line(found)}"
        console.print(f"{escape(label)}: {verdict}{line}", highlight=False, soft_wrap=True)
        for reason in broken[label]:
            console.print(f"  [red]{escape(label)}[/]: {escape(reason)}", highlight=False, soft_wrap=True)
    console.print("files were held against base and adapter; nothing was scored", highlight=False, soft_wrap=True)


def _weights_line(weights: WeightsResult) -> str:
    """The line on the stored weights."""
    line, updated = f"weights {weights.total.relative_error:.3%} from the merge", weights.updated
    if updated.survival is not None:
        line += f", {updated.survival:.2%} of the adapter's change (± {updated.survival_stderr:.2%})"
    return line
