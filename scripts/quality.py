"""Score every type of every format on one model, and print the table that docs/quality.md shows.

    python scripts/quality.py --base DIR [--adapter DIR] --work DIR [--tokens 8192]

One run of the exporter for all GGUF types and one for each safetensors type, so that all are compared with the same
reference on the same tokens. The text is the docstrings of Python's standard library, which neither the demo's nor the
real model's adapter was trained on. Removes what it wrote.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def standard_library_text(limit: int = 400_000) -> str:
    """Docstrings of the standard library's top-level modules, in the order of their names, each once."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.py")):
        found |= dict.fromkeys(_docstrings(file))
        if sum(map(len, found)) > limit:
            break
    return "\n\n".join(found)


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 200:
                yield text


def run(arguments: argparse.Namespace, output_format: str, quants: list[str], text: Path) -> list[dict[str, Any]]:
    """Export some types of one format with open gates; returns the manifest's artifacts."""
    out = arguments.work / f"quality-{output_format}-{quants[0]}"
    command = [str(Path(sys.executable).with_name("exporter")), "export", "--base", str(arguments.base)]
    for adapter in arguments.adapter:
        command += ["--adapter", str(adapter)]
    for quant in quants:
        command += ["--quant", quant]
    command += ["--format", output_format, "--out", str(out), "--force", "--json", "--gate", "1e9"]
    command += ["--calibration", str(text), "--eval-tokens", str(arguments.tokens)]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    artifacts: list[dict[str, Any]] = json.loads(done.stdout)["artifacts"]
    return artifacts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, required=True, help="a folder for outputs; they are removed")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--types", nargs="*", help="GGUF types; by default all")
    arguments = parser.parse_args()
    from exporter.backends.gguf.types import FILE_TYPES
    from exporter.backends.safetensors import DTYPES

    arguments.work.mkdir(parents=True, exist_ok=True)
    text = arguments.work / "standard-library.txt"
    text.write_text(standard_library_text(), encoding="utf-8")
    print("| type | bytes | perplexity | reference | change | ± (paired) | same top | tokens |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    batches = [("safetensors", [quant]) for quant in DTYPES] + [("gguf", arguments.types or list(FILE_TYPES))]
    for output_format, quants in batches:
        for artifact in run(arguments, output_format, quants, text):
            figures = artifact["verification"]
            print(
                f"| {artifact['format']} {artifact['quant']} | {artifact['bytes'] / 1e6:,.1f} MB "
                f"| {figures['perplexity']:.4f} | {figures['reference_perplexity']:.4f} | {figures['delta']:+.3%} "
                f"| {figures['delta_stderr']:.3%} | {figures['same_top']:.2%} | {figures['tokens_scored']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
