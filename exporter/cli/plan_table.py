"""The table of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.units import duration, size

if TYPE_CHECKING:
    from exporter.plan.export_plan import ExportPlan


def show_plan(console: Console, plan: ExportPlan) -> None:
    """Print the plan: inputs, a table of files with their types, memory, disk and time, and the runtimes that judge."""
    model = plan.model
    architecture = (model.config.get("architectures") or ["unknown"])[0]
    console.print(
        f"[bold]{escape(model.name)}[/]  {architecture}, {model.parameters / 1e6:,.1f} M parameters, "
        f"{len(model.tensors)} tensors, {size(plan.input_bytes)}",
        highlight=False,
    )
    for source, adapter in zip(plan.adapters, model.adapters, strict=True):
        summary = adapter.summary
        kind = f"rank {', '.join(map(str, summary['ranks']))}" if "ranks" in summary else summary["method"]
        console.print(
            f"  adapter {escape(source.name)}: {escape(kind)} on {summary['targets']} tensors",
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
    """The line on evaluation and calibration tokens."""
    parts = []
    if evaluation := plan.tokens.evaluation:
        parts.append(f"evaluation {len(evaluation.ids)} windows of {evaluation.n_ctx} tokens")
    if calibration := plan.tokens.calibration:
        parts.append(f"calibration {len(calibration.ids)} windows of {calibration.window} tokens")
    source = plan.tokens.evaluation or plan.tokens.calibration
    return f"{', '.join(parts)} of {escape(source.source)}" if source else ""


def _files_table(plan: ExportPlan) -> Table:
    from exporter.plan.as_json import type_shares

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
