"""Perplexity and KL divergence of one GGUF file: `exporter verify` beside llama-perplexity's two passes.

    python -m scripts.benchmarks.verify --base DIR [--adapter DIR] --work DIR [--quant Q4_K_M] [--tokens 4096]

The same file, the same tokens, in one run. llama-perplexity's first pass writes the log-probabilities of a GGUF file of
the merge (F16: on a CPU the fastest of those that are not quantized), its second compares with them. The exporter gets
base and adapter, walks through them in float32, and keeps hidden states in place of log-probabilities; with a reference
pack it takes those from the disk. `verify` also hashes the files and checks the stored weights, which llama-perplexity
does not do. Answers are left out. The time of making the GGUF files does not count.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from scripts.benchmarks import measure
from scripts.benchmarks.export import EXPORTER, Step, as_data, measure_steps, median, print_runs, remove, warm_inputs
from scripts.benchmarks.measure import CommandFailedError
from scripts.measurements.quality import standard_library_text
from scripts.oracles.llamacpp import Oracle, OracleError, prepare
from scripts.tables import write_json

N_CTX = 512
# Figures of the two, as llama-perplexity prints them.
PRINTED = {"KL": r"Mean\s+KLD:\s+([0-9.]+)", "perplexity": r"Mean PPL\(Q\)\s*:\s+([0-9.]+)"}


def source(args: argparse.Namespace) -> list[str]:
    """Base and adapter as options."""
    return ["--base", str(args.base)] + (["--adapter", str(args.adapter)] if args.adapter else [])


def make_files(args: argparse.Namespace) -> Path:
    """The GGUF files and the text; returns the folder of the files."""
    folder: Path = args.work / "files"
    command = [str(EXPORTER), "export", *source(args), "--format", "gguf", "--quant", args.quant, "--quant", "F16"]
    command += ["--out", str(folder), "--name", "merged", "--no-verify", "--force", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (args.work / "text.txt").write_text(standard_library_text(), encoding="utf-8")
    return folder


def theirs(args: argparse.Namespace, oracle: Oracle, folder: Path) -> list[Step]:
    """Both passes of llama-perplexity."""
    logits = args.work / "log-probabilities"
    both = [str(oracle.perplexity_tool), "-c", str(N_CTX), "-t", str(args.threads), "--kl-divergence-base", str(logits)]
    first = [*both, "-m", str(folder / "merged-F16.gguf"), "-f", str(args.work / "text.txt")]
    first += ["--chunks", str(args.tokens // N_CTX)]
    second = [*both, "-m", str(folder / f"merged-{args.quant}.gguf"), "--kl-divergence"]
    # The second pass reads what the first one wrote, so it is the output of neither.
    return [Step("first pass", first, logits), Step("second pass", second, args.work / "nothing")]


def ours(args: argparse.Namespace, folder: Path) -> list[Step]:
    """`exporter verify` on that file alone; the same with a reference pack, which is made first."""
    text = ["--calibration", str(args.work / "text.txt"), "--eval-tokens", str(args.tokens)]
    pack, nothing = args.work / "pack", args.work / "nothing"
    verify = [str(EXPORTER), "verify", str(folder)]
    once = ["--max-eval-tokens", str(args.tokens), "--gate", "1000", "--json"]
    return [
        Step("verify", [*verify, *source(args), *text, *once, "--no-answers"], nothing),
        Step(
            "reference",
            [str(EXPORTER), "reference", *source(args), *text, "--out", str(pack), "--no-answers", "--quiet"],
            pack,
        ),
        Step("verify, pack", [*verify, "--reference", str(pack), "--gate", "1000", "--no-answers", "--json"], nothing),
    ]


def alone(folder: Path, quant: str) -> None:
    """Leave one artifact in a folder, so that verifying it scores that one."""
    file = folder / "export.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["artifacts"] = [one for one in manifest["artifacts"] if one["quant"] == quant]
    file.write_text(json.dumps(manifest), encoding="utf-8")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=measure.cores(), help="of llama-perplexity")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        oracle = prepare()
        folder = make_files(args)
        alone(folder, args.quant)
        head = {"machine": measure.machine(), "quant": args.quant, "tokens": args.tokens}
        print("\n".join(f"{name:10} {value}" for name, value in head.items()), flush=True)
        warm_inputs(args)
        runs = measure_steps([*theirs(args, oracle, folder), *ours(args, folder)], args.repeats, args.work, keep=True)
    except (CommandFailedError, OracleError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print_runs(runs)
    log = (args.work / "logs" / f"second pass-{args.repeats}.log").read_text(encoding="utf-8", errors="replace")
    for name, pattern in PRINTED.items():
        found = re.search(pattern, log)
        print(f"llama-perplexity's {name}: {found[1] if found else 'not printed'}")
    verified = (args.work / "logs" / f"verify-{args.repeats}.log").read_text(encoding="utf-8")
    figures = json.loads(verified[verified.index("\n{") : verified.rindex("\n}") + 2])[f"gguf {args.quant}"]
    print(f"ours: KL {figures['kl_divergence']['mean']:.6f}, perplexity {figures['perplexity']:.4f}")
    wall = {name: median(found, "wall_seconds") for name, found in runs.items()}
    two = wall["first pass"] + wall["second pass"]
    theirs_disk = median(runs["first pass"], "output_bytes")
    ratios = {
        "verify / two passes, wall": wall["verify"] / two,
        "(reference + verify with it) / two passes, wall": (wall["reference"] + wall["verify, pack"]) / two,
        "verify / two passes, disk": median(runs["verify"], "written_bytes") / theirs_disk,
        "pack / log-probabilities, disk": median(runs["reference"], "output_bytes") / theirs_disk,
    }
    print("\n".join(f"{name}: {value:.3f}" for name, value in ratios.items()))
    write_json(args.json, head | {"ratios": ratios, "runs": as_data(runs)})
    for path in (folder, args.work / "log-probabilities", args.work / "pack"):
        remove(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
