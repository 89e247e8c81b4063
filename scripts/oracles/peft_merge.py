"""What users have today: load a base and an adapter, merge with peft, save. A baseline and an oracle.

In bf16 it is the script that benchmarks compare with; with --float32 it makes what the comparisons compare with.

    python -m scripts.oracles.peft_merge --base DIR --adapter DIR --out DIR         # all in bf16: the usual script
    python -m scripts.oracles.peft_merge ... --float32                              # merged and saved in float32
    python -m scripts.oracles.peft_merge ... --float32 --save-dtype bf16            # merged in float32, rounded once
    python -m scripts.oracles.peft_merge ... --float32 --base-files                 # input of the GGUF oracle
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def merge(base: Path, adapter: Path | None, out: Path, load_dtype: str, save_dtype: str) -> None:
    """Load the base in one dtype, merge the adapter with peft, and save model and tokenizer in another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, DTYPES[load_dtype]))
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload()
    if save_dtype != load_dtype:
        loaded.to(getattr(torch, DTYPES[save_dtype]))
    loaded.save_pretrained(out, safe_serialization=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def copy_base_files(base: Path, out: Path, save_dtype: str) -> None:
    """Replace what transformers wrote beside the weights by the base's own files, with the config's dtype updated."""
    for written in out.iterdir():
        if written.is_file() and not written.name.endswith(WEIGHTS):
            written.unlink()
    for original in base.iterdir():
        if original.is_file() and not original.name.endswith(WEIGHTS):
            shutil.copyfile(original, out / original.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPES[save_dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Read the arguments and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter; without one the base is saved as it is")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--float32", action="store_true", help="load and merge in float32 instead of bf16")
    parser.add_argument("--save-dtype", choices=sorted(DTYPES), help="default: the dtype that it was merged in")
    parser.add_argument("--base-files", action="store_true", help="copy the base's config and tokenizer files")
    args = parser.parse_args()
    load_dtype = "fp32" if args.float32 else "bf16"
    save_dtype = args.save_dtype or load_dtype
    merge(args.base, args.adapter, args.out, load_dtype, save_dtype)
    if args.base_files:
        copy_base_files(args.base, args.out, save_dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
