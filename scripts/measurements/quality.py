"""Score every type of every format on one model, and print the table that docs/measurements shows.

    python -m scripts.measurements.quality --base DIR [--adapter DIR] --work DIR [--tokens 4096] \\
        [--formats gguf] [--types …]

One run of the exporter makes every type, so that all are compared with the same reference on the same tokens. The text
is the docstrings of Python's standard library. Neither the demo's nor the real model's adapter was trained on it.
Calibration tokens come from the same text, further on. transformers scores GPTQ, which needs `make gptqmodel`. The
script removes its files.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


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


def run(arguments: argparse.Namespace, outputs: list[dict[str, Any]], text: Path) -> list[dict[str, Any]]:
    """Export with open gates; returns the artifacts of all manifests."""
    folders = [Path(output["out"]) for output in outputs]
    recipe = {
        "base": str(arguments.base.absolute()),
        "adapters": [str(adapter.absolute()) for adapter in arguments.adapter],
        "outputs": outputs,
        "force": True,
        "calibration": {"text": str(text.absolute())},
        "evaluation": {"tokens": arguments.tokens, "gate": {"*": 1e9}, "answers": False},
    }
    file = arguments.work / "quality.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    try:
        command = [str(Path(sys.executable).with_name("exporter")), "export", str(file), "--json"]
        environment = os.environ | {"EXPORTER_SERVE_ENV": ""}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    found = json.loads(done.stdout)
    manifests: list[dict[str, Any]] = found if isinstance(found, list) else [found]
    return [artifact for manifest in manifests for artifact in manifest["artifacts"]]


def with_error(value: float, stderr: float | None, form: str) -> str:
    """A figure, and its standard error over the windows where there is one."""
    return f"{value:{form}}" if stderr is None else f"{value:{form}} ± {stderr:{form.lstrip('+')}}"


def divergence(figures: dict[str, Any]) -> str:
    """Mean KL divergence in nats, where the runtime gives it."""
    found = figures["kl_divergence"]
    return with_error(found["mean"], found["stderr"], ".5f") if found else "-"


def outputs_of(name: str, wanted: list[str] | None, work: Path) -> list[dict[str, Any]]:
    """Outputs of one format, as in a recipe: GGUF files share a folder, model folders do not."""
    from exporter.backends.registry import load_backend

    quants = [quant for quant in load_backend(name).quants if not wanted or quant in wanted]
    if name == "gguf":
        return [{"format": name, "quant": quants, "out": str(work / "quality-gguf")}]
    options = {"options": {"force_unservable": True}} if name == "gptq" else {}
    return [
        {"format": name, "quant": [quant], "out": str(work / f"quality-{name}-{quant}")} | options for quant in quants
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, required=True, help="a folder for outputs; they are removed")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--formats", nargs="+", choices=["safetensors", "gguf", "gptq"], default=["safetensors", "gguf"]
    )
    parser.add_argument("--types", nargs="*", help="types of these formats; by default all")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = arguments.work / "standard-library.txt"
    text.write_text(standard_library_text(), encoding="utf-8")
    outputs = [
        one for name in arguments.formats for one in outputs_of(name, arguments.types, arguments.work.absolute())
    ]
    artifacts = run(arguments, outputs, text)
    print("| type | bytes | perplexity | reference | change | mean KL | same top | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for artifact in artifacts:
        figures = artifact["verification"]
        if reason := figures.get("not_scored"):
            print(f"| {artifact['format']} {artifact['quant']} | not scored: {reason} |")
            continue
        print(
            f"| {artifact['format']} {artifact['quant']} | {artifact['bytes'] / 1e6:,.1f} MB "
            f"| {figures['perplexity']:.4f} | {figures['reference_perplexity']:.4f} "
            f"| {with_error(figures['delta'], figures['delta_stderr'], '+.3%')} | {divergence(figures)} "
            f"| {with_error(figures['same_top'], figures['same_top_stderr'], '.2%')} | {figures['tokens_scored']} |"
        )


if __name__ == "__main__":
    main()
