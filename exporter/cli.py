"""The command line: arguments → recipe → pipeline, and the screen. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from exporter.errors import ExporterError, RecipeError
from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.recipe import Evaluation, Execution, Recipe

app = typer.Typer(
    name="exporter",
    help="Merge a LoRA adapter into its Qwen base, write files that serve, and prove that they still are the model "
    "that was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="A recipe, in place of the options.")]
Base = Annotated[str | None, typer.Option(help="The base: a folder or a hub id, with @revision if need be.")]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="The adapter, likewise; may be repeated.")]
Format = Annotated[str | None, typer.Option("--format", help="The backend: see `exporter formats`.")]
Quants = Annotated[list[str] | None, typer.Option("--quant", help="Quantization type; may be repeated.")]
Out = Annotated[Path | None, typer.Option(help="The folder to create.")]
Name = Annotated[str | None, typer.Option(help="Name of the merged model, for files and metadata.")]
Text = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Text to calibrate on and to score: .txt, .jsonl, or a dataset of the hub as "
        "OWNER/NAME[@REVISION][:SPLIT][#COLUMN]. Default: the embedded text.",
    ),
]
CalibrationTokens = Annotated[int | None, typer.Option(help="Calibration tokens.", show_default="16384")]
Window = Annotated[int | None, typer.Option(help="Tokens in a calibration window.", show_default="1024")]
Seed = Annotated[int | None, typer.Option(help="Decides which calibration windows are taken.", show_default="0")]
EvalTokens = Annotated[int | None, typer.Option(help="Evaluation tokens.", show_default="4096")]
EvalWindow = Annotated[
    int | None,
    typer.Option(help="Tokens in an evaluation window, as llama-perplexity's --ctx-size.", show_default="512"),
]
Gates = Annotated[
    list[str] | None, typer.Option("--gate", help="Largest change of perplexity, as TYPE=0.05 or 0.05 for every type.")
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the gate, and say so in the manifest.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
MaxShard = Annotated[str | None, typer.Option("--max-shard-size", help="Largest safetensors shard, such as 5GB.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="An option of the backend, as KEY=VALUE.")]
Imatrix = Annotated[
    str | None,
    typer.Option(help="Importance matrix for GGUF: auto, none, or a file of llama-imatrix. Default: by the type."),
]
ForceUnservable = Annotated[
    bool, typer.Option("--force-unservable", help="GPTQ: write what no server takes, for transformers alone.")
]
ComputeDtype = Annotated[
    str | None,
    typer.Option("--compute-dtype", help="What the walk computes in: float32 or bfloat16.", show_default="float32"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Worker threads. Default: one a core.")]
Runtime = Annotated[
    str | None,
    typer.Option(help="llamacpp, transformers or vllm: what scores. Default: the format's first that can be had here."),
]
Endpoint = Annotated[
    str | None, typer.Option(help="Address of a running vLLM server to score with, such as http://localhost:8000.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


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
    eval_window: EvalWindow = None,
    gate: Gates = None,
    no_verify: NoVerify = False,
    force: Force = False,
    max_shard_size: MaxShard = None,
    option: Options = None,
    imatrix: Imatrix = None,
    force_unservable: ForceUnservable = False,
    compute_dtype: ComputeDtype = None,
    device: Device = "auto",
    threads: Threads = None,
    runtime: Runtime = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge, write, verify and publish."""
    from exporter.screen import Screen, stderr_console

    console = stderr_console()
    screen = Screen(console, quiet=quiet)

    def run() -> int:
        from exporter.pipeline import export

        recipe = _recipe(**arguments)
        result = export(recipe, _execution(device, threads, runtime, endpoint), screen)
        if as_json:
            manifests = [folder.manifest for folder in result.folders]
            print(json.dumps(manifests[0] if len(manifests) == 1 else manifests, indent=2, ensure_ascii=False))
        else:
            for folder in result.folders:
                print(folder.path)
        return 0 if result.passed else 3

    arguments = _arguments(locals())
    _guarded(console, run, screen.stop)


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
    eval_window: EvalWindow = None,
    gate: Gates = None,
    no_verify: NoVerify = False,
    force: Force = False,
    max_shard_size: MaxShard = None,
    option: Options = None,
    imatrix: Imatrix = None,
    force_unservable: ForceUnservable = False,
    compute_dtype: ComputeDtype = None,
    device: Device = "auto",
    threads: Threads = None,
    runtime: Runtime = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show what an export would read, write, need and check. Writes nothing."""
    console = Console(stderr=True)
    arguments = _arguments(locals())

    def run() -> int:
        from exporter.plan import describe, make_plan
        from exporter.screen import show_plan, stdout_console

        plan = make_plan(_recipe(**arguments), _execution(device, threads, runtime, endpoint))
        if as_json:
            print(json.dumps(describe(plan), indent=2, ensure_ascii=False))
        else:
            show_plan(stdout_console(), plan)
        return 0

    _guarded(console, run)


@app.command("verify")
def verify_command(
    artifact: Annotated[Path, typer.Argument(help="A published output folder.")],
    base: Annotated[str, typer.Option(help="The base it was made from.")],
    adapter: Adapters = None,
    runtime: Runtime = None,
    endpoint: Endpoint = None,
    calibration: Text = None,
    eval_tokens: EvalTokens = None,
    eval_window: EvalWindow = None,
    gate: Gates = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check a published folder's hashes, and score it again against base and adapter."""
    from exporter.screen import Screen, stderr_console

    console = stderr_console()
    screen = Screen(console)

    def run() -> int:
        from exporter.merge import resolve_device
        from exporter.recipe import Calibration
        from exporter.verify.published import verify_published

        text, evaluation = Calibration(text=calibration), _evaluation(eval_tokens, eval_window, gate)
        resolve_device(_execution(device, None, runtime, endpoint).device)
        adapters = tuple(adapter or ())
        result = verify_published(artifact, base, adapters, text, evaluation, runtime, device, screen, endpoint)
        if as_json:
            print(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
        result.show(console)
        return 0 if result.passed else 3

    _guarded(console, run, screen.stop)


@app.command("formats")
def formats_command(as_json: AsJson = False) -> None:
    """List the backends, their quantization types, and what each needs installed."""
    console = Console()

    def run() -> int:
        from exporter.backends.registry import backend_names, load_backend
        from exporter.errors import BackendError
        from exporter.screen import show_error

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

    _guarded(Console(stderr=True), run)


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a recipe, out of a command's locals."""
    names = (
        "recipe_file", "base", "adapter", "format_", "quant", "out", "name", "calibration", "calibration_tokens",
        "window", "seed", "eval_tokens", "eval_window", "gate", "no_verify", "force", "max_shard_size", "option",
        "imatrix", "force_unservable", "compute_dtype",
    )  # fmt: skip
    return {name: values[name] for name in names}


def _recipe(
    recipe_file: Path | None,
    base: str | None,
    adapter: list[str] | None,
    format_: str | None,
    quant: list[str] | None,
    out: Path | None,
    name: str | None,
    calibration: str | None,
    calibration_tokens: int | None,
    window: int | None,
    seed: int | None,
    eval_tokens: int | None,
    eval_window: int | None,
    gate: list[str] | None,
    no_verify: bool,
    force: bool,
    max_shard_size: str | None,
    option: list[str] | None,
    imatrix: str | None,
    force_unservable: bool,
    compute_dtype: str | None,
) -> Recipe:
    """Make a recipe from a file or from options.

    Raises:
        RecipeError: both are given, or an option that is needed is not.
    """
    from exporter.recipe import Recipe

    if recipe_file is not None:
        given = (
            base, adapter, format_, quant, out, name, calibration, calibration_tokens, window, seed, eval_tokens,
            eval_window, gate, max_shard_size, option, imatrix, compute_dtype,
        )  # fmt: skip
        if force_unservable or any(value is not None and value != [] for value in given):
            raise RecipeError(
                str(recipe_file),
                found="a recipe and options beside it",
                expected="one of the two (only --force and --no-verify go with a recipe)",
                remedy="Put the options into the recipe.",
            )
        recipe = Recipe.load(recipe_file)
        return recipe.model_copy(update={"force": recipe.force or force, "verify": recipe.verify and not no_verify})
    for flag, value in (("--base", base), ("--format", format_), ("--out", out)):
        if value is None:
            raise RecipeError(flag, found="nothing", expected="a value", remedy="See `exporter export --help`.")
    options = dict(_pair(text, "--option") for text in option or [])
    if max_shard_size is not None:
        options["max_shard_size"] = max_shard_size
    if imatrix is not None:
        options["imatrix"] = imatrix
    if force_unservable:
        options["force_unservable"] = "true"
    return Recipe.build(
        {
            "base": base,
            "adapters": adapter or (),
            "outputs": [{"format": format_, "quant": quant or (), "out": out, "options": options}],
            "name": name,
            "verify": not no_verify,
            "force": force,
            **_given(compute_dtype=compute_dtype),
            "calibration": _given(text=calibration, tokens=calibration_tokens, window=window, seed=seed),
            "evaluation": _given(tokens=eval_tokens, n_ctx=eval_window, gate=_gates(gate or [])),
        }
    )


def _given(**values: Any) -> dict[str, Any]:
    """The values that were given; the recipe knows the defaults of the others."""
    return {key: value for key, value in values.items() if value is not None}


def _evaluation(eval_tokens: int | None, eval_window: int | None, gate: list[str] | None) -> Evaluation:
    from pydantic import ValidationError

    from exporter.recipe import Evaluation

    try:
        return Evaluation.model_validate(_given(tokens=eval_tokens, n_ctx=eval_window, gate=_gates(gate or [])))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            str(first["loc"][0]), found=repr(first.get("input")), expected=first["msg"], remedy="Correct the option."
        ) from None


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise RecipeError(flag, found=repr(text), expected="KEY=VALUE", remedy="Correct the option.")
    return key, value


def _gates(texts: list[str]) -> dict[str, float]:
    """Limits by type from `TYPE=0.05`, or for all types from `0.05`."""
    gates: dict[str, float] = {}
    for text in texts:
        key, value = _pair(text, "--gate") if "=" in text else ("*", text)
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if not 0 <= limit < float("inf"):
            raise RecipeError("--gate", found=repr(text), expected="TYPE=0.05 or 0.05", remedy="Correct the limit.")
        gates[key] = limit
    return gates


def _execution(device: str, threads: int | None, runtime: str | None, endpoint: str | None) -> Execution:
    from pydantic import ValidationError

    from exporter.recipe import Execution

    try:
        return Execution(device=device, threads=threads, runtime=runtime, endpoint=endpoint)
    except ValidationError as error:
        first = error.errors()[0]
        wanted = {"device": "auto, cpu, cuda or cuda:N", "endpoint": "an address such as http://localhost:8000"}
        name = str(first["loc"][0])
        raise RecipeError(
            f"--{name}",
            found=repr(first.get("input")),
            expected=wanted.get(name, first["msg"]),
            remedy="Correct the option.",
        ) from None


def _guarded(console: Console, run: Callable[[], int], stop: Callable[[], None] = lambda: None) -> None:
    """Run a command; turn what a user can cause into a message and an exit status, never a traceback."""
    try:
        status = run()
    except ExporterError as error:
        from exporter.screen import show_error

        stop()
        show_error(console, error)
        status = error.exit_status
    except KeyboardInterrupt:
        stop()
        console.print("interrupted; the same command goes on from what is staged", highlight=False)
        status = 130
    except (OSError, MemoryError) as error:
        stop()
        console.print(f"[bold red]failed[/]  {escape(str(error) or type(error).__name__)}", highlight=False)
        status = 1
    raise typer.Exit(status)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
