"""Time, memory and disk of the exporter beside what users have today, measured in one run.

    python -m scripts.benchmarks.export merge  --base DIR --adapter DIR --work DIR    # beside the usual tools
    python -m scripts.benchmarks.export memory --base DIR --adapter DIR --work DIR    # large models: ours alone

`merge` runs five steps, each as a process of its own, interleaved, and takes medians over the repeats:

    peft          scripts/oracles/peft_merge.py: load in bf16, merge, save
    convert       llama.cpp's converter: what peft saved, as bf16 GGUF
    quantize      llama-quantize of that file
    safetensors   exporter export --format safetensors --no-verify
    gguf          exporter export --format gguf --no-verify

Before each step dirty pages are written back, and the inputs are read once before the first, so that every step finds
them in the page cache if memory allows. The exporter syncs its files before it publishes them, and that counts; the
other tools leave theirs to the kernel. What was written is removed unless --keep is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchmarks import measure
from scripts.benchmarks.measure import CommandFailedError, Measurement
from scripts.oracles.llamacpp import CONSTRAINTS, Oracle, OracleError, prepare
from scripts.tables import megabytes, table, write_json

PEFT_MERGE = Path(__file__).resolve().parents[1] / "oracles" / "peft_merge.py"
EXPORTER = Path(sys.executable).parent / "exporter"
Runs = dict[str, list[Measurement]]


@dataclass(frozen=True)
class Step:
    """One command to measure and what it makes."""

    name: str
    command: Sequence[str]
    output: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def exporter_step(args: argparse.Namespace, output_format: str) -> Step:
    """The exporter with one output and without verification."""
    output = args.work / f"exporter-{output_format}"
    command = [str(args.exporter), "export", "--base", str(args.base)]
    if args.adapter is not None:
        command += ["--adapter", str(args.adapter)]
    command += ["--format", output_format, "--out", str(output), "--no-verify", "--device", args.device]
    if output_format == "gguf":
        command += ["--quant", args.quant]
    return Step(output_format, command, output)


def usual_steps(args: argparse.Namespace, oracle: Oracle) -> list[Step]:
    """Today's tools, one after the other."""
    merged, converted = args.work / "peft", args.work / "merged-bf16.gguf"
    quantized = args.work / f"merged-{args.quant}.gguf"
    peft = [sys.executable, str(PEFT_MERGE), "--base", str(args.base), "--out", str(merged)]
    if args.adapter is not None:
        peft += ["--adapter", str(args.adapter)]
    convert = oracle.convert_command(merged, converted, "bf16", args.assume_pre)
    quantize = oracle.quantize_command(converted, quantized, args.quant, args.threads)
    return [
        Step("peft", peft, merged),
        Step("convert", convert, converted, oracle.environment()),
        Step("quantize", quantize, quantized),
    ]


def measure_steps(steps: Sequence[Step], repeats: int, work: Path, keep: bool) -> Runs:
    """Run all steps, then all again, and keep every measurement. Outputs of one repeat are removed before the next."""
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    runs: Runs = {step.name: [] for step in steps}
    for repeat in range(1, repeats + 1):
        for step in steps:
            remove(step.output)
        for step in steps:
            scratch = work / "scratch" / step.name
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            log = logs / f"{step.name}-{repeat}.log"
            found = measure.run(step.command, step.output, scratch, log, step.environment)
            runs[step.name].append(found)
            line = f"{step.name}: {found.wall_seconds:.1f} s, {megabytes(found.peak_process_bytes)} MB"
            print(f"[{repeat}/{repeats}] {line}", file=sys.stderr, flush=True)
    if not keep:
        for path in [step.output for step in steps] + [work / "scratch", logs]:
            remove(path)
    return runs


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def median(runs: Sequence[Measurement], name: str) -> float:
    """Median of one figure over the repeats."""
    return float(statistics.median(getattr(run, name) for run in runs))


def print_runs(runs: Runs) -> None:
    """Print the medians of every step, and the range of the wall time."""
    header = [
        "step",
        "wall s",
        "fastest",
        "slowest",
        "CPU s",
        "peak MB",
        "tree MB",
        "temporary MB",
        "written MB",
        "output MB",
    ]
    rows = []
    for name, found in runs.items():
        walls = [run.wall_seconds for run in found]
        sizes = ["peak_process_bytes", "peak_tree_bytes", "largest_temporary_bytes", "written_bytes", "output_bytes"]
        times = [f"{median(found, 'wall_seconds'):.2f}", f"{min(walls):.2f}", f"{max(walls):.2f}"]
        cpu = f"{median(found, 'cpu_seconds'):.2f}"
        rows.append([name, *times, cpu, *(megabytes(median(found, size)) for size in sizes)])
    print(table(header, rows))
    print("peak: largest process, mapped pages counted · tree: sum over the step's processes · temporary: largest file")
    print("written outside the output · written: all that went to the disk")


def ratios(runs: Runs) -> dict[str, float]:
    """The exporter's median wall time over that of what does the same today."""
    wall = {name: median(found, "wall_seconds") for name, found in runs.items()}
    return {
        "safetensors / peft": wall["safetensors"] / wall["peft"],
        "gguf / (peft + convert + quantize)": wall["gguf"] / (wall["peft"] + wall["convert"] + wall["quantize"]),
    }


def inputs(args: argparse.Namespace) -> dict[str, object]:
    """What was measured on, for the head of the output and the JSON file."""
    found: dict[str, object] = {"machine": measure.machine(), "base_bytes": measure.size_of(args.base)}
    if args.adapter is not None:
        found["adapter_bytes"] = measure.size_of(args.adapter)
    return found | {"quant": args.quant, "repeats": args.repeats}


def benchmark_merge(args: argparse.Namespace) -> None:
    """The exporter beside today's tools."""
    head = inputs(args)
    print("\n".join(f"{name:14} {value}" for name, value in head.items()), flush=True)
    steps = [*usual_steps(args, prepare(args.constraints)), *(exporter_step(args, name) for name in args.formats)]
    warm_inputs(args)
    runs = measure_steps(steps, args.repeats, args.work, args.keep)
    print_runs(runs)
    found = ratios(runs) if {"safetensors", "gguf"} <= set(runs) else {}
    print("\n".join(f"{name}: {value:.3f}" for name, value in found.items()))
    write_json(args.json, head | {"ratios": found, "runs": as_data(runs)})


def benchmark_memory(args: argparse.Namespace) -> None:
    """The exporter alone."""
    head = inputs(args)
    print("\n".join(f"{name:14} {value}" for name, value in head.items()), flush=True)
    runs: Runs = {}
    for name in args.formats:  # one after the other: two outputs of a large model need not fit on the disk
        runs |= measure_steps([exporter_step(args, name)], args.repeats, args.work, args.keep)
    print_runs(runs)
    write_json(args.json, head | {"runs": as_data(runs)})


def warm_inputs(args: argparse.Namespace) -> None:
    """Read base and adapter into the page cache."""
    for path in (args.base, args.adapter):
        if path is not None:
            measure.warm(path)


def as_data(runs: Runs) -> dict[str, list[dict[str, object]]]:
    """Every measurement as plain data."""
    return {name: [dataclasses.asdict(run) for run in found] for name, found in runs.items()}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, repeats, summary in (
        ("merge", 3, "the exporter beside peft, the converter and llama-quantize"),
        ("memory", 1, "the exporter alone"),
    ):
        command = commands.add_parser(name, help=summary)
        command.add_argument("--base", type=Path, required=True)
        command.add_argument("--adapter", type=Path)
        command.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
        command.add_argument("--formats", nargs="+", choices=["safetensors", "gguf"], default=["safetensors", "gguf"])
        command.add_argument("--quant", default="Q4_K_M", help="type of the GGUF (default: Q4_K_M)")
        command.add_argument("--repeats", type=int, default=repeats, help=f"default: {repeats}")
        command.add_argument("--exporter", type=Path, default=EXPORTER, help="default: beside the interpreter")
        command.add_argument("--device", default="cpu", help="of the exporter (default: cpu)")
        command.add_argument("--keep", action="store_true", help="leave the last repeat's outputs and logs")
        command.add_argument("--json", type=Path, metavar="FILE", help="write every measurement as JSON")
        if name == "merge":
            command.add_argument("--threads", type=int, default=measure.cores(), help="of llama-quantize")
            command.add_argument("--assume-pre", metavar="NAME", help="pre-tokenizer for the converter")
            command.add_argument(
                "--constraints", type=Path, default=CONSTRAINTS, help="file that pins llama-cpp-python"
            )
    return parser.parse_args()


def main() -> int:
    """Run one of the two benchmarks."""
    args = parse_arguments()
    try:
        (benchmark_merge if args.command == "merge" else benchmark_memory)(args)
    except (CommandFailedError, OracleError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
