"""Compare the exporter's files of one model with those that peft and llama.cpp make from the same inputs.

    python -m scripts.oracles.check_model --base DIR --adapter DIR --work DIR [--types Q4_K_M Q8_0] [--imatrix FILE]

Prints, for docs/measurements: the share of bit-equal elements of the safetensors output against peft's float32 merge
rounded once. For every GGUF type it prints the tensors, blocks, elements and metadata keys that differ from converter +
llama-quantize of that merge. It prints the perplexity of one type beside llama-perplexity's on the same file and text.
With an importance matrix both sides quantize with it, and the table has the types that need one. The script makes one
type at a time, so that two sets of files never lie on the disk, and removes its files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.measurements.quality import standard_library_text
from scripts.oracles import compare_gguf, compare_safetensors
from scripts.oracles.llamacpp import Oracle, prepare
from scripts.oracles.peft_merge import copy_base_files, merge

EXPORTER = Path(sys.executable).with_name("exporter")
NAME = "model"


def export(args: argparse.Namespace, output_format: str, quant: str, *options: str) -> tuple[Path, dict[str, Any]]:
    """Export one type; returns the output folder and the manifest."""
    out = args.work / f"ours-{output_format}"
    command = [str(EXPORTER), "export", "--base", str(args.base), "--adapter", str(args.adapter), "--name", NAME]
    command += [
        "--format",
        output_format,
        "--quant",
        quant,
        "--out",
        str(out),
        "--force",
        "--json",
        "--quiet",
        *options,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return out, json.loads(done.stdout)


def check_safetensors(args: argparse.Namespace) -> None:
    """The bf16 output against peft's float32 merge rounded once to bf16."""
    theirs = args.work / "theirs"
    merge(args.base, args.adapter, theirs, "fp32", "bf16")
    ours, _ = export(args, "safetensors", "bf16", "--no-verify")
    found = compare_safetensors.compare(ours, theirs)
    print(f"safetensors bf16: {found.equal_share:.6%} of elements bit-equal, at most {found.max_ulp} ulp apart, ")
    print(f"  names, dtypes and shapes {'equal' if found.structure_equal else 'DIFFER'}", flush=True)
    shutil.rmtree(theirs)
    shutil.rmtree(ours)


def check_gguf(args: argparse.Namespace, oracle: Oracle, source: Path, quant: str) -> str:
    """One GGUF type against converter + llama-quantize; returns a row of the table."""
    weighed = [] if args.imatrix is None else ["--option", f"imatrix={args.imatrix}"]
    ours, _ = export(args, "gguf", quant, "--no-verify", *weighed)
    theirs = source
    if quant != "F32":
        theirs = oracle.quantize(source, args.work / f"theirs-{quant}.gguf", quant, threads=2, imatrix=args.imatrix)
    found = compare_gguf.compare(ours / f"{NAME}-{quant}.gguf", theirs)
    types = sum(1 for tensor in found.tensors if tensor.why != "data")
    blocks = sum(tensor.blocks for tensor in found.tensors)
    elements = sum(tensor.elements for tensor in found.tensors)
    missing = len(found.tensors_only_ours) + len(found.tensors_only_theirs)
    metadata = ", ".join(found.metadata_differing()) or "none"
    shutil.rmtree(ours)
    if theirs != source:
        theirs.unlink()
    total = found.tensors_equal + len(found.tensors)
    return (
        f"| {quant} | {found.tensors_equal} of {total} | {types + missing} | {blocks} of {found.blocks} "
        f"| {elements} of {found.elements} | {metadata} |"
    )


def check_perplexity(args: argparse.Namespace, oracle: Oracle, quant: str) -> None:
    """Our perplexity of a file beside llama-perplexity's on the same file, text and windows."""
    text = args.work / "text.txt"
    text.write_bytes(standard_library_text(60_000).encode())
    ours, manifest = export(
        args, "gguf", quant, "--calibration", str(text), "--eval-tokens", str(args.tokens), "--gate", "1e9"
    )
    figures, windows = manifest["artifacts"][0]["verification"], manifest["evaluation"]["windows"]
    file = ours / f"{NAME}-{quant}.gguf"
    theirs, error = oracle.perplexity(file, text, ctx=512, chunks=windows)
    print(
        f"perplexity of {quant}, {windows} windows: "
        f"ours {figures['perplexity']:.4f} ± {figures['perplexity_stderr']:.5f}, "
        f"llama-perplexity {theirs:.4f} ± {error:.5f}, ratio {figures['perplexity'] / theirs:.6f}",
        flush=True,
    )
    shutil.rmtree(ours)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a folder for outputs; they are removed")
    parser.add_argument("--types", nargs="*", help="GGUF types; by default all, or all that need no importance matrix")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="an importance matrix that llama-imatrix wrote")
    parser.add_argument(
        "--assume-pre",
        metavar="NAME",
        help="pre-tokenizer of a tokenizer that llama.cpp does not know (the demo: qwen2)",
    )
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    from exporter.backends.gguf.file_types import FILE_TYPES

    args.work.mkdir(parents=True, exist_ok=True)
    oracle = prepare()
    check_safetensors(args)
    merged = args.work / NAME
    merge(args.base, args.adapter, merged, "fp32", "fp32")
    copy_base_files(args.base, merged, "fp32")
    source = oracle.convert(merged, args.work / "theirs-F32.gguf", "f32", args.assume_pre, name=None)
    shutil.rmtree(merged)
    print(
        "| type | tensors equal | other type or missing | blocks differing | elements differing | metadata differing |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    every = [name for name, file_type in FILE_TYPES.items() if args.imatrix or not file_type.needs_imatrix]
    for quant in args.types or every:
        print(check_gguf(args, oracle, source, quant), flush=True)
    source.unlink()
    check_perplexity(args, oracle, "Q4_K_M")


if __name__ == "__main__":
    main()
