"""Our GPTQ beside GPTQModel's, in one run: time, memory, and divergence from the trained model.

    python -m scripts.benchmarks.gptq --base DIR [--adapter DIR] --work DIR [--windows 16] [--quants gptq-int4-g128 …]

Needs `make gptqmodel`. Both get the same calibration tokens: windows of 1,024 of the embedded text. Ours goes from base
and adapter to the published folder, `exporter export --format gptq --no-verify`; GPTQModel from a merged folder in the
base's dtype to its saved one, and the merging is not counted. Its damping, ordering and scales are its defaults. Both
folders are then unpacked by scripts/oracles/unpack_gptq.py. scripts/measurements/divergence.py scores them on tokens of
the same text that neither has seen. With more than one type, the first is compared with GPTQModel's and the others are
ours alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from scripts.benchmarks import measure
from scripts.benchmarks.export import EXPORTER, Step, as_data, measure_steps, print_runs, remove, warm_inputs
from scripts.tables import write_json

WORKER = Path(__file__).resolve().parents[2] / "exporter" / "backends" / "gptqmodel" / "worker.py"
WINDOW = 1024


def source(args: argparse.Namespace) -> list[str]:
    """Base and adapter as options."""
    return ["--base", str(args.base)] + (["--adapter", str(args.adapter)] if args.adapter else [])


def ours(args: argparse.Namespace, quant: str) -> Step:
    """One of our exports."""
    output = args.work / f"ours-{quant}"
    command = [str(EXPORTER), "export", *source(args), "--format", "gptq", "--quant", quant, "--out", str(output)]
    command += ["--no-verify", "--device", args.device, "--window", str(WINDOW)]
    command += ["--calibration-tokens", str(WINDOW * args.windows), "--eval-tokens", str(args.eval_tokens)]
    if int(quant.removeprefix("gptq-int")[0]) not in (4, 8):
        command.append("--force-unservable")
    return Step(f"ours {quant}", command, output)


def theirs(args: argparse.Namespace, quant: str) -> Step:
    """GPTQModel on a merged folder, which is made here, with the windows that ours takes."""
    merged, output = args.work / "merged", args.work / f"gptqmodel-{quant}"
    command = [str(EXPORTER), "export", *source(args), "--format", "safetensors", "--out", str(merged)]
    subprocess.run([*command, "--no-verify", "--force", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    bits, _, group = quant.removeprefix("gptq-int").partition("-g")
    job = {
        "model": str(merged.absolute()),
        "target": str(output.absolute()),
        "windows": calibration_windows(args),
        "max_shard_bytes": 5 * 10**9,
        "device": args.device.partition(":")[0],
        "threads": measure.cores(),
        "quantize": {
            "bits": int(bits),
            "group_size": -1 if group == "all" else int(group),
            "sym": True,
            "desc_act": False,
            "offload_to_disk_path": str((args.work / "offload").absolute()),
        },
    }
    file = args.work.absolute() / "job.json"
    file.write_text(json.dumps(job))
    # GPTQModel leaves a log in the folder that it is run in.
    command = ["env", "-C", str(args.work), sys.executable, "-I", str(WORKER), str(file)]
    environment = {"GPTQMODEL_CPU_WORKERS": str(max(2, measure.cores())), "HF_HUB_OFFLINE": "1"}
    return Step(f"gptqmodel {quant}", command, output, environment)


def calibration_windows(args: argparse.Namespace) -> list[list[int]]:
    """The windows that the exporter calibrates on. In a process of its own: measuring ones should stay small."""
    code = f"""
import json
from pathlib import Path
from exporter.tokens.windows import make_token_sets
from exporter.recipe import Calibration, Evaluation
from exporter.inputs.tokenizer import TokenizerFiles
tokenizer = TokenizerFiles.choose(Path({str(args.base)!r}), ())
wanted = Calibration(tokens={WINDOW * args.windows}, window={WINDOW})
sets = make_token_sets(wanted, Evaluation(tokens={args.eval_tokens}), tokenizer, evaluate=False, calibrate=True)
print(json.dumps(sets.calibration.ids))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    windows: list[list[int]] = json.loads(done.stdout)
    return windows


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--quants", nargs="+", default=["gptq-int4-g128"])
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--device", default="cpu", help="where both compute")
    parser.add_argument("--alone", action="store_true", help="without GPTQModel")
    parser.add_argument("--keep", action="store_true", help="leave the folders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    head = {"machine": measure.machine(), "windows": args.windows, "calibration_tokens": WINDOW * args.windows}
    print("\n".join(f"{name:20} {value}" for name, value in head.items()), flush=True)
    steps = [ours(args, quant) for quant in args.quants]
    if not args.alone:
        steps.insert(1, theirs(args, args.quants[0]))
    warm_inputs(args)
    runs = measure_steps(steps, 1, args.work, keep=True)
    print_runs(runs)
    sys.stdout.flush()
    scores = args.work / "divergence.json"
    command = [sys.executable, "-m", "scripts.measurements.divergence", *source(args)]
    command += ["--tokens", str(args.eval_tokens)]
    subprocess.run([*command, *(str(step.output) for step in steps), "--json", str(scores)], check=True)
    found = json.loads(scores.read_text())
    ratios: dict[str, float] = {}
    if not args.alone:
        first, second = steps[0], steps[1]
        walls = [runs[step.name][0].wall_seconds for step in (first, second)]
        divergences = [found[step.output.name]["divergence"]["mean"] for step in (first, second)]
        ratios = {"wall": walls[0] / walls[1], "KL": divergences[0] / divergences[1]}
        print("\n".join(f"ours / GPTQModel's, {name}: {value:.3f}" for name, value in ratios.items()))
    write_json(args.json, head | {"ratios": ratios, "runs": as_data(runs), "divergence": found})
    if not args.keep:
        for step in steps:
            remove(step.output)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
