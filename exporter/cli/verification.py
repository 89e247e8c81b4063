"""The results of `exporter verify`: on the terminal, and as a page."""

from __future__ import annotations

from rich.console import Console

from exporter.cli.verdict_table import show_notes, show_table, show_weights
from exporter.publish.report.verified_again import files_page, scored_page
from exporter.verify.published.files_only import FilesResult
from exporter.verify.published.verify import PublishedResult

BY_REFERENCE = (
    "held against a reference pack: of the weights it knows a sketch, and of answers their first token; the whole "
    "takes base and adapter (--base, --adapter; --files-only without a runtime)"
)


def show_verification(console: Console, result: PublishedResult | FilesResult) -> None:
    """Print the verdict table. For files that were only compared, print a line for each artifact with its faults."""
    if isinstance(result, FilesResult):
        show_weights(console, result.weights, result.broken)
        return
    show_notes(console, result.notes)
    show_table(console, result.verdicts, result.sizes, by_reference=result.by_reference)
    if result.by_reference:
        console.print(BY_REFERENCE, highlight=False, soft_wrap=True)


def report_page(result: PublishedResult | FilesResult) -> bytes:
    """The report of a verification as HTML."""
    if isinstance(result, FilesResult):
        return files_page(result.folder, result.weights, result.broken)
    notes = [*result.notes, *([f"{BY_REFERENCE[0].upper()}{BY_REFERENCE[1:]}."] if result.by_reference else [])]
    return scored_page(result.folder, result.verdicts, result.evaluation, notes)
