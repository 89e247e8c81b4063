"""A reference pack written from the reference: what needs torch of it."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporter.artifact.durable import json_document, write_durably
from exporter.artifact.hashing import hash_all
from exporter.artifact.input_records import describe_inputs, model_files
from exporter.artifact.staging import Staging
from exporter.errors import RuntimeScoreError, WriteError
from exporter.inputs.row_blocks import DTYPES
from exporter.plan.reference_pack import (
    DESCRIPTION_NAME,
    MODEL_FOLDER,
    SCHEMA_VERSION,
    SKETCHES_FILE,
    PackPlan,
    lay_out,
    model_documents,
)
from exporter.reference.pack.sketch import sketch_data
from exporter.reference.predictions import Reference
from exporter.runtimes.base import TokenScores, score_logits
from exporter.tour.walk.sizes import HEAD_ROWS
from exporter.version import __version__

# Largest mean KL(float32 states || bfloat16 states) in nats; beyond it, states stay in float32. On the demo it is
# 1.0e-6, and Q8_0, the closest of the quantized types, is 7.5e-5 away from the reference.
MAX_STATE_LOSS = 1e-5
# A staging folder is used again under this key. Every file is written anew, so nothing of an earlier run can remain;
# the walk has a key of its own for what it goes on from.
STAGING_KEY = "reference pack"
# Positions whose distributions are compared at a time, in float64.
_COMPARED_ROWS = 16
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class StateLoss:
    """What rounding the hidden states costs, against the float32 states of the same reference.

    Attributes:
        mean: KL(float32 states || rounded states) in nats, over the scored positions.
        largest: the farthest position.
        delta_log: difference of the mean negative log-probabilities of the right tokens, rounded less float32.
    """

    mean: float = 0.0
    largest: float = 0.0
    delta_log: float = 0.0


def write_pack(
    plan: PackPlan, reference: Reference, hashes: Mapping[Path, str], staging: Staging, device: str, threads: int
) -> dict[str, Any]:
    """Write a pack to a staging folder; publishing it is left to the caller.

    Args:
        plan: what it will hold.
        reference: the trained model on all windows that were scored.
        hashes: SHA-256 of every input file.
        staging: where it is written.
        device: where the reference was computed.
        threads: threads that merge once more for the sketches of the weights, and that hash.

    Returns:
        Its description.

    Raises:
        RuntimeScoreError: a log-probability is not finite.
        WriteError: the disk is full.
    """
    if not np.isfinite(reference.scores.log_probabilities).all():
        raise RuntimeScoreError(
            "the reference", found="log-probabilities that are not finite", expected="numbers",
            remedy="Compute in float32, with --compute-dtype.",
        )  # fmt: skip
    loss = StateLoss() if plan.dtype == "float32" else measure_loss(reference)
    dtype = plan.dtype if loss.mean <= MAX_STATE_LOSS else "float32"
    tensors = plan.tensors(dtype, len(reference.windows.ids))
    for name, (header, _) in lay_out(tensors).items():
        inside = [tensor for tensor, one in tensors.items() if one.file == name]
        if name == SKETCHES_FILE:
            data = sketch_data(plan.model, threads)
        else:
            data = (part for tensor in inside for part in _data(tensor, plan, reference, dtype))
        _write(staging.files / name, chain([header], data))
    documents = model_documents(plan.model)
    # Not every model has the same files, and a killed run may have been of another.
    shutil.rmtree(staging.files / MODEL_FOLDER, ignore_errors=True)
    (staging.files / MODEL_FOLDER).mkdir()
    for name, content in documents.items():
        write_durably(staging.files / name, content)
    files = hash_all(staging.files, [*lay_out(tensors), *documents], threads)
    description = _describe(plan, reference, hashes, device, dtype, loss)
    description["files"] = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    write_durably(staging.files / DESCRIPTION_NAME, json_document(description))
    return description


def measure_loss(reference: Reference) -> StateLoss:
    """What it costs to round the hidden states to bfloat16."""
    windows = reference.windows
    divergences: list[npt.NDArray[np.float64]] = []
    differences: list[npt.NDArray[np.float64]] = []
    for number, ids in enumerate(windows.ids):
        exact = reference.hidden(number)
        rounded = exact.to(torch.bfloat16).float()
        targets = torch.tensor(ids[windows.first_scored + 1 :], device=exact.device)
        for first in range(0, windows.scored, _COMPARED_ROWS):
            rows = slice(first, first + _COMPARED_ROWS)
            with torch.inference_mode():
                found = reference.head.logits(rounded[rows])
                right, _ = score_logits(found, targets[rows])
                p = torch.log_softmax(reference.head.logits(exact[rows]).double(), dim=1)
                q = torch.log_softmax(found.double(), dim=1)
                divergences.append(q.neg_().add_(p).mul_(p.exp_()).sum(dim=1).cpu().numpy())
            differences.append(reference.scores.log_probabilities[number, rows] - right)
    kl = np.concatenate(divergences)
    return StateLoss(float(kl.mean()), float(kl.max()), float(np.concatenate(differences).mean()))


def _data(name: str, plan: PackPlan, reference: Reference, dtype: str) -> Iterator[memoryview]:
    """The data of one tensor of the pack, a bounded part at a time."""
    if name == "hidden":
        for number in range(len(reference.windows.ids)):
            yield _bytes(reference.hidden(number).to(DTYPES["F32" if dtype == "float32" else "BF16"]))
    elif name == "head":
        vocabulary = reference.head.shape[0]
        for first in range(0, vocabulary, HEAD_ROWS):
            yield _bytes(reference.head.rows(first, min(HEAD_ROWS, vocabulary - first)))
    elif name == "prompt_ids":
        yield np.array([token for prompt in plan.prompts for token in prompt.ids], dtype="<i4").data.cast("B")
    elif name == "prompt_states":
        if reference.prompts is not None:
            yield _bytes(reference.prompts)
    elif name == "ids":
        yield np.array(reference.windows.ids, dtype="<i4").data.cast("B")
    elif name == "log_probabilities":
        yield np.ascontiguousarray(reference.scores.log_probabilities, dtype="<f8").data.cast("B")
    else:
        yield np.ascontiguousarray(reference.scores.top_tokens, dtype="<i4").data.cast("B")


def _bytes(values: torch.Tensor) -> memoryview:
    return values.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _write(file: Path, parts: Iterable[bytes | memoryview]) -> None:
    try:
        with file.open("wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise WriteError(
            file.name, found=str(error), expected="room to write", remedy="Free some disk and run again."
        ) from None


def perplexity(scores: TokenScores) -> float:
    """exp of the mean negative log-probability, or the largest float where that overflows."""
    return math.exp(min(-float(scores.log_probabilities.mean()), math.log(sys.float_info.max)))


def _describe(
    plan: PackPlan, reference: Reference, hashes: Mapping[Path, str], device: str, dtype: str, loss: StateLoss
) -> dict[str, Any]:
    windows = reference.windows
    states: dict[str, Any] = {"dtype": dtype}
    if dtype != plan.dtype:
        states["wanted"] = plan.dtype
    states["loss"] = {"kl_mean": loss.mean, "kl_largest": loss.largest, "delta_log": loss.delta_log}
    return {
        "schema_version": SCHEMA_VERSION,
        "exporter": __version__,
        "name": plan.model.name,
        "inputs": describe_inputs(plan.base, plan.adapters, plan.model, model_files(plan.model), hashes),
        "versions": {package: version(package) for package in _PACKAGES},
        "device": device.partition(":")[0],
        "compute_dtype": plan.compute_dtype,
        "evaluation": {
            "source": windows.source,
            "windows": len(windows.ids),
            "first": plan.first,
            "n_ctx": windows.n_ctx,
            "first_scored": windows.first_scored,
            "tokens_scored": windows.tokens_scored,
            "sha256": windows.sha256,
        },
        "perplexity": perplexity(reference.scores),
        "vocabulary": plan.vocabulary,
        "hidden_size": plan.hidden,
        "states": states,
        "head": {"dtype": plan.tensors(dtype, len(windows.ids))["head"].dtype},
        "prompts": {prompt.name: len(prompt.ids) for prompt in plan.prompts},
    }
