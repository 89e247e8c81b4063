"""The options of the command line, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
        "OWNER/NAME[@REVISION][:[CONFIGURATION/]SPLIT][#COLUMN]. Default: the embedded text.",
    ),
]
CalibrationTokens = Annotated[int | None, typer.Option(help="Calibration tokens.", show_default="16384")]
Window = Annotated[int | None, typer.Option(help="Tokens in a calibration window.", show_default="1024")]
Seed = Annotated[int | None, typer.Option(help="Decides which calibration windows are taken.", show_default="0")]
EvalTokens = Annotated[int | None, typer.Option(help="Evaluation tokens.", show_default="4096")]
MaxEvalTokens = Annotated[
    int | None,
    typer.Option(help="Evaluation tokens that may be drawn in all while a verdict is undecided.", show_default="16384"),
]
EvalWindow = Annotated[
    int | None,
    typer.Option(help="Tokens in an evaluation window, as llama-perplexity's --ctx-size.", show_default="512"),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="LIMIT",
        help="Largest change of perplexity, as TYPE=0.05 or 0.05 for every type, in place of all limits; or one limit "
        "in place of its own, as TYPE:change=0.05, TYPE:kl=0.1, TYPE:top_k_kl=0.1 (the form that vLLM gives), "
        "TYPE:same_top=0.9, or *:kl=0.1. May be repeated.",
    ),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the gate, and say so in the manifest.")]
NoAnswers = Annotated[bool, typer.Option("--no-answers", help="Score only: do not ask the artifacts for answers.")]
FilesOnly = Annotated[
    bool,
    typer.Option(
        "--files-only", help="Hold weights, configuration and tokenizer against base and adapter; run nothing."
    ),
]
Judged = Annotated[
    Path,
    typer.Argument(
        metavar="ARTIFACT", help="A published output folder; with --reference a GGUF file or a model folder too."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the report of this verification, as HTML.")
]
ForceReport = Annotated[bool, typer.Option("--force", help="Replace the report's file if it exists.")]
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
KeepReference = Annotated[
    bool, typer.Option("--keep-reference", help="Write a reference pack too, to OUT.reference beside the first output.")
]
ReferenceDtype = Annotated[
    str | None,
    typer.Option(
        "--reference-dtype",
        help="What a reference pack keeps hidden states in: float32 or bfloat16.",
        show_default="float32",
    ),
]
ReferencePack = Annotated[
    Path | None,
    typer.Option("--reference", metavar="DIR", help="A reference pack, in place of base, adapter and text."),
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
