"""The command line: arguments → recipe → pipeline, and the screen. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from exporter.cli.arguments import (
    arguments_of,
    check_files_only,
    check_plot_file,
    check_verify_options,
    evaluation_from,
    execution_from,
    recipe_from,
    reference_recipe_from,
)
from exporter.cli.exit_status import guarded
from exporter.cli.options import (
    Adapters,
    AsJson,
    Base,
    CalibrationTokens,
    ComputeDtype,
    Device,
    Endpoint,
    EvalTokens,
    EvalWindow,
    FilesOnly,
    Force,
    ForceReport,
    ForceUnservable,
    Format,
    Gates,
    Imatrix,
    Judged,
    KeepReference,
    MaxEvalTokens,
    MaxShard,
    Name,
    NoAnswers,
    NoVerify,
    Options,
    Out,
    Quants,
    Quiet,
    RecipeFile,
    ReferenceDtype,
    ReferencePack,
    Report,
    Runtime,
    Seed,
    Text,
    Threads,
    Window,
)
from exporter.errors import ArtifactError
from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.recipe import Calibration, Evaluation
    from exporter.verify.published.files_only import FilesResult
    from exporter.verify.published.verify import PublishedResult


app = typer.Typer(
    name="exporter",
    help="Merge a LoRA adapter into its Qwen base, write files that serve, and prove that they still are the model "
    "that was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"exporter {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    del version


@app.command("export")
def export_command(
    recipe_file: RecipeFile = None,
    base: Base = None,
    adapter: Adapters = None,
    format_: Format = None,
    quant: Quants = None,
    out: Out = None,
    name: Name = None,
    calibration: Text = None,
    calibration_tokens: CalibrationTokens = None,
    window: Window = None,
    seed: Seed = None,
    eval_tokens: EvalTokens = None,
    max_eval_tokens: MaxEvalTokens = None,
    eval_window: EvalWindow = None,
    gate: Gates = None,
    no_verify: NoVerify = False,
    no_answers: NoAnswers = False,
    force: Force = False,
    max_shard_size: MaxShard = None,
    option: Options = None,
    imatrix: Imatrix = None,
    force_unservable: ForceUnservable = False,
    compute_dtype: ComputeDtype = None,
    keep_reference: KeepReference = False,
    reference_dtype: ReferenceDtype = None,
    device: Device = "auto",
    threads: Threads = None,
    runtime: Runtime = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge, write, verify and publish."""
    from exporter.cli.consoles import stderr_console
    from exporter.cli.screen import Screen

    console = stderr_console()
    screen = Screen(console, quiet=quiet)

    def run() -> int:
        from exporter.cli.verdict_table import show_verdicts
        from exporter.pipeline.export import export

        recipe = recipe_from(**arguments)
        result = export(recipe, execution_from(device, threads, runtime, endpoint), screen)
        if not quiet:
            show_verdicts(console, result)
        if as_json:
            manifests = [folder.manifest for folder in result.folders]
            print(json.dumps(manifests[0] if len(manifests) == 1 else manifests, indent=2, ensure_ascii=False))
        else:
            for folder in result.folders:
                print(folder.path)
        return 0 if result.passed else 3

    arguments = arguments_of(locals())
    guarded(console, run, screen.stop)


@app.command("plan")
def plan_command(
    recipe_file: RecipeFile = None,
    base: Base = None,
    adapter: Adapters = None,
    format_: Format = None,
    quant: Quants = None,
    out: Out = None,
    name: Name = None,
    calibration: Text = None,
    calibration_tokens: CalibrationTokens = None,
    window: Window = None,
    seed: Seed = None,
    eval_tokens: EvalTokens = None,
    max_eval_tokens: MaxEvalTokens = None,
    eval_window: EvalWindow = None,
    gate: Gates = None,
    no_verify: NoVerify = False,
    no_answers: NoAnswers = False,
    force: Force = False,
    max_shard_size: MaxShard = None,
    option: Options = None,
    imatrix: Imatrix = None,
    force_unservable: ForceUnservable = False,
    compute_dtype: ComputeDtype = None,
    keep_reference: KeepReference = False,
    reference_dtype: ReferenceDtype = None,
    device: Device = "auto",
    threads: Threads = None,
    runtime: Runtime = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show what an export would read, write, need and check. Writes nothing."""
    console = Console(stderr=True)
    arguments = arguments_of(locals())

    def run() -> int:
        from exporter.cli.consoles import stdout_console
        from exporter.cli.plan_table import show_plan
        from exporter.pipeline.plan import make_plan
        from exporter.plan.as_json import describe

        plan = make_plan(recipe_from(**arguments), execution_from(device, threads, runtime, endpoint))
        if as_json:
            print(json.dumps(describe(plan), indent=2, ensure_ascii=False))
        else:
            show_plan(stdout_console(), plan)
        return 0

    guarded(console, run)


@app.command("verify")
def verify_command(
    artifact: Judged,
    base: Base = None,
    adapter: Adapters = None,
    reference: ReferencePack = None,
    runtime: Runtime = None,
    endpoint: Endpoint = None,
    calibration: Text = None,
    eval_tokens: EvalTokens = None,
    max_eval_tokens: MaxEvalTokens = None,
    eval_window: EvalWindow = None,
    gate: Gates = None,
    no_answers: NoAnswers = False,
    files_only: FilesOnly = False,
    report: Report = None,
    force: ForceReport = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check a published folder's hashes, and score it again against base and adapter or a reference pack."""
    from exporter.cli.consoles import stderr_console
    from exporter.cli.screen import Screen

    console = stderr_console()
    screen = Screen(console)

    def run() -> int:
        from exporter.recipe import Calibration

        text = Calibration() if calibration is None else Calibration(text=calibration)
        evaluation = evaluation_from(eval_tokens, max_eval_tokens, eval_window, gate, no_answers)
        check_verify_options(
            reference, base=base, adapter=adapter, calibration=calibration, eval_tokens=eval_tokens,
            max_eval_tokens=max_eval_tokens, eval_window=eval_window,
        )  # fmt: skip
        if files_only:
            check_files_only(
                reference=reference, runtime=runtime, endpoint=endpoint, calibration=calibration,
                eval_tokens=eval_tokens, max_eval_tokens=max_eval_tokens, eval_window=eval_window, gate=gate,
                no_answers=no_answers,
            )  # fmt: skip
        if report is None:
            return told(found(text, evaluation))
        from exporter.cli.verification import report_page
        from exporter.publish.report.verified_again import check_report, refused_page

        check_report(report, artifact, force=force)
        try:
            result = found(text, evaluation)
        except ArtifactError as error:
            # Not of a reference pack that is at fault itself.
            if type(error) is ArtifactError:
                report.write_bytes(refused_page(artifact, error))
            raise
        report.write_bytes(report_page(result))
        return told(result)

    def found(text: Calibration, evaluation: Evaluation) -> PublishedResult | FilesResult:
        adapters = tuple(adapter or ())
        if files_only:
            from exporter.verify.published.files_only import verify_files

            return verify_files(artifact, base or "", adapters, screen)
        from exporter.merge.device import resolve_device
        from exporter.verify.published.verify import verify_published, verify_with_pack

        place = resolve_device(execution_from(device, None, runtime, endpoint).device)
        if reference is not None:
            gate, answers = evaluation.gate, evaluation.answers
            return verify_with_pack(artifact, reference, gate, runtime, place, screen, endpoint, answers=answers)
        return verify_published(artifact, base or "", adapters, text, evaluation, runtime, place, screen, endpoint)

    def told(result: PublishedResult | FilesResult) -> int:
        from exporter.cli.verification import show_verification

        if as_json:
            print(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
        show_verification(console, result)
        return 0 if result.passed else 3

    guarded(console, run, screen.stop)


@app.command("reference")
def reference_command(
    base: Base = None,
    adapter: Adapters = None,
    out: Out = None,
    name: Name = None,
    calibration: Text = None,
    eval_tokens: EvalTokens = None,
    max_eval_tokens: MaxEvalTokens = None,
    eval_window: EvalWindow = None,
    no_answers: NoAnswers = False,
    force: Force = False,
    compute_dtype: ComputeDtype = None,
    reference_dtype: ReferenceDtype = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a reference pack, which artifacts are verified with where the base is not."""
    from exporter.cli.consoles import stderr_console
    from exporter.cli.screen import Screen

    console = stderr_console()
    screen = Screen(console, quiet=quiet)

    def run() -> int:
        recipe = reference_recipe_from(
            base,
            adapter,
            out,
            name,
            calibration,
            eval_tokens,
            max_eval_tokens,
            eval_window,
            no_answers,
            force,
            compute_dtype,
            reference_dtype,
        )
        from exporter.reference.pack.make import make_reference

        description = make_reference(recipe, execution_from(device, threads, None, None), screen)
        print(json.dumps(description, indent=2, ensure_ascii=False) if as_json else recipe.out)
        return 0

    guarded(console, run, screen.stop)


@app.command("compare")
def compare_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders, published or rejected.")],
    out: Annotated[
        Path | None, typer.Option(help="Write size against quality as a plot too: a file that ends in .svg or .html.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Load each and measure its speed, one after another.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Show artifacts side by side, from the manifests of their folders."""
    from exporter.cli.consoles import stderr_console, stdout_console
    from exporter.cli.screen import Screen

    console = stderr_console()
    screen = Screen(console)

    def run() -> int:
        check_plot_file(out)
        from exporter.compare.compare import compare_folders

        comparison = compare_folders(folders)
        if speed:
            from exporter.compare.speed import measure_folders
            from exporter.merge.device import resolve_device

            comparison = compare_folders(folders, measure_folders(folders, resolve_device(device), screen))
        if as_json:
            print(json.dumps(comparison.as_json(), indent=2, ensure_ascii=False))
        else:
            comparison.show(stdout_console())
        if out is not None:
            from exporter.compare.plot import plot_html, plot_svg

            draw = plot_svg if out.suffix == ".svg" else plot_html
            out.write_text(draw(comparison), encoding="utf-8")
        return 0

    guarded(console, run, screen.stop)


@app.command("formats")
def formats_command(as_json: AsJson = False) -> None:
    """List the backends, their quantization types, and what each needs installed."""
    console = Console()

    def run() -> int:
        from exporter.backends.registry import backend_names, load_backend
        from exporter.cli.consoles import show_error
        from exporter.errors import BackendError

        backends = []
        for name in backend_names():
            try:
                backends.append(load_backend(name))
            except BackendError as error:
                show_error(Console(stderr=True), error)
        if as_json:
            listing = [
                {"name": b.name, "summary": b.summary, "quants": b.quants, "needs": b.needs, "packages": b.packages}
                for b in backends
            ]
            print(json.dumps(listing, indent=2))
            return 0
        for backend in backends:
            console.print(f"[bold]{backend.name}[/]  {escape(backend.summary)}", highlight=False)
            console.print(f"  types     {' '.join(backend.quants)}", highlight=False, soft_wrap=True)
            console.print(f"  needs     {backend.needs}; installed: {', '.join(backend.packages)}", highlight=False)
        return 0

    guarded(Console(stderr=True), run)


def main() -> None:
    """Entry point of the console script."""
    # Threads that wait for each other spin for a moment and then give up their core. By default they spin so long that
    # beside another job they keep the core from the thread that is waited for; if they give it up at once, waking takes
    # longer than most waits. Three layers of a 0.5B's GPTQ on two cores: 43 s like this, 42 s by default, 71 s with
    # OMP_WAIT_POLICY=passive; one layer beside two busy processes: 40 s, 88 s and 37 s. Read when libgomp is loaded,
    # which is with torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(app())


if __name__ == "__main__":
    main()
