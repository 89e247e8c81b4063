"""A reference pack written from the reference, and the reference read back from it: what needs torch of it."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporter.artifact.inputs import describe_inputs, model_files
from exporter.artifact.manifest import dump
from exporter.artifact.staging import Staging, write_durably
from exporter.calibration import Windows
from exporter.checkpoint import StoredTensor, read_header
from exporter.errors import ReferencePackError, RuntimeScoreError, WriteError
from exporter.hashing import hash_all
from exporter.merge import DTYPES
from exporter.runtimes.base import TokenScores, score_logits
from exporter.tensor_reader import TensorReader
from exporter.torch_threads import use_threads
from exporter.tour.sizes import HEAD_ROWS
from exporter.verify.answers.source import Prompt
from exporter.verify.pack import (
    DESCRIPTION_NAME,
    PROMPTS_FILE,
    REMEDY,
    SCHEMA_VERSION,
    TOKENS_FILE,
    PackPlan,
    lay_out,
)
from exporter.verify.pack_model import model_documents
from exporter.verify.pack_record import Description, open_tensors
from exporter.verify.reference import Head, Reference
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
        threads: threads that hash.

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
        data = (part for tensor in inside for part in _data(tensor, plan, reference, dtype))
        _write(staging.files / name, chain([header], data))
    documents = model_documents(plan.model)
    for name, content in documents.items():
        (staging.files / name).parent.mkdir(exist_ok=True)
        write_durably(staging.files / name, content)
    files = hash_all(staging.files, [*lay_out(tensors), *documents], threads)
    description = _describe(plan, reference, hashes, device, dtype, loss)
    description["files"] = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    write_durably(staging.files / DESCRIPTION_NAME, dump(description))
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


# --- reading back --------------------------------------------------------------------------------------------------


class StoredHead(Head):
    """A head that is read from its file, a block of rows at a time.

    Args:
        tensor: where it is.
        reader: reads it.
        device: where logits are computed.
    """

    def __init__(self, tensor: StoredTensor, reader: TensorReader, device: str) -> None:
        self._tensor, self._reader, self._device = tensor, reader, device
        self.shape, self.dtype = (tensor.shape[0], tensor.shape[1]), DTYPES[tensor.dtype]
        # One buffer for all blocks: memory that is new to each would be zeroed and faulted in, which takes longer than
        # reading it.
        self._raw = torch.empty(0, dtype=torch.uint8)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """See `Head`."""
        width = self._tensor.row_bytes
        if len(self._raw) < count * width:
            self._raw = torch.empty(count * width, dtype=torch.uint8)
        raw = self._raw[: count * width]
        self._reader.read_into(raw.numpy().data, self._tensor, first * width)
        return raw.view(self.dtype).view(count, -1).to(self._device)


@contextmanager
def opened_reference(folder: Path, description: Description, device: str, threads: int) -> Iterator[Reference]:
    """The reference of a pack, while its files are open. States and head are read as they are needed.

    Args:
        folder: the pack.
        description: what `read_description` returned for it.
        device: where logits are computed.
        threads: threads that compute on the CPU.

    Raises:
        ReferencePackError: a file is missing, was changed, or does not fit the description.
    """
    stored = open_tensors(folder, description)
    with TensorReader() as reader:
        ids = _array(reader, stored["ids"], "<i4")
        evaluation = description.evaluation
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        if digest != evaluation.sha256 or ids.min() < 0 or ids.max() >= description.vocabulary:
            raise ReferencePackError(
                f"{TOKENS_FILE}: ids",
                found=f"ids from {ids.min()} to {ids.max()}, sha256 {digest[:16]}…",
                expected=f"a vocabulary of {description.vocabulary}, sha256 {evaluation.sha256[:16]}…",
                remedy=REMEDY,
            )
        windows = Windows(tuple(map(tuple, ids.tolist())), evaluation.n_ctx, evaluation.source, evaluation.sha256)
        scores = TokenScores(
            _array(reader, stored["log_probabilities"], "<f8"),
            _array(reader, stored["top_tokens"], "<i4").astype(np.int64),
        )
        if not np.isfinite(scores.log_probabilities).all():
            raise ReferencePackError(
                f"{TOKENS_FILE}: log_probabilities", found="NaN or infinity", expected="numbers", remedy=REMEDY
            )
        states = stored["hidden"]

        def hidden(window: int) -> torch.Tensor:
            raw = reader.rows(states, window * windows.scored, windows.scored)
            return torch.frombuffer(raw, dtype=DTYPES[states.dtype]).view(windows.scored, -1).float().to(device)

        if device == "cpu":
            # As the walk does, whose logits these are to be again.
            use_threads(threads)
        head, prompts = StoredHead(stored["head"], reader, device), _array(reader, stored["prompt_states"], "<f4")
        yield Reference(windows, hidden, head, scores, torch.tensor(prompts, device=device))


def stored_prompts(folder: Path, description: Description) -> tuple[Prompt, ...]:
    """The prompts of a pack, whose files must have been checked.

    Raises:
        ReferencePackError: one has a token that the vocabulary lacks.
    """
    with TensorReader() as reader:
        ids = _array(reader, read_header(folder / PROMPTS_FILE)["prompt_ids"], "<i4")
    if ids.size and (ids.min() < 0 or ids.max() >= description.vocabulary):
        raise ReferencePackError(
            f"{PROMPTS_FILE}: prompt_ids", found=f"ids from {ids.min()} to {ids.max()}",
            expected=f"a vocabulary of {description.vocabulary}", remedy=REMEDY,
        )  # fmt: skip
    ends = accumulate(description.prompts.values())
    return tuple(
        Prompt(name, tuple(ids[end - length : end].tolist()))
        for (name, length), end in zip(description.prompts.items(), ends, strict=True)
    )


def _array(reader: TensorReader, tensor: StoredTensor, dtype: str) -> npt.NDArray[Any]:
    raw = reader.slice(tensor, 0, tensor.nbytes)
    return np.frombuffer(raw, dtype=dtype).reshape(tensor.shape)
