"""The reference read back from a pack: what needs torch of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporter.errors import ReferencePackError
from exporter.inputs.checkpoint import StoredTensor
from exporter.inputs.row_blocks import DTYPES
from exporter.inputs.tensor_reader import TensorReader
from exporter.libraries.torch_threads import use_threads
from exporter.merge.model import MergedModel
from exporter.plan.reference_pack import BASE_VALUES, DELTA, MERGED, PROMPTS_FILE, REMEDY, TOKENS_FILE, sketch_tensors
from exporter.reference.pack.description import Description, check_tensor, open_tensors
from exporter.reference.pack.model_files import packed_model
from exporter.reference.predictions import Head, Reference
from exporter.runtimes.base import TokenScores
from exporter.tokens.prompts import Prompt
from exporter.tokens.windows import Windows

Floats = npt.NDArray[np.float32]


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


class StoredSketches:
    """The sketches of the weights, read a few rows at a time; see `exporter.verify.weights.sketch_limits`.

    Args:
        tensors: the pack's tensors by name.
        model: the merged model, without weights.
        reader: reads them.

    Raises:
        ReferencePackError: one is missing, or is not as the model's shapes have it.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], model: MergedModel, reader: TensorReader) -> None:
        wanted = sketch_tensors(model, {tensor.name for tensor in model.tensors if f"{DELTA}{tensor.name}" in tensors})
        for name, tensor in wanted.items():
            check_tensor(name, tensors.get(name), tensor, "the shapes of the model")
        self._tensors, self._reader = tensors, reader
        values = _array(reader, tensors[BASE_VALUES], "<i4")
        self._values = dict(zip((tensor.name for tensor in model.tensors), values.tolist(), strict=True))

    def rows(self, name: str, first: int, count: int) -> tuple[Floats, Floats | None]:
        """Sketches of rows of a merged tensor and of the adapter's change of them: float32, shape (count, runs); None
        where it has none. Called from several threads."""
        delta = self._tensors.get(f"{DELTA}{name}")
        merged = self._read(self._tensors[f"{MERGED}{name}"], first, count)
        return merged, None if delta is None else self._read(delta, first, count)

    def _read(self, tensor: StoredTensor, first: int, count: int) -> Floats:
        return np.frombuffer(self._reader.rows(tensor, first, count), dtype="<f4").reshape(count, tensor.columns)

    def base_values(self, name: str) -> tuple[int, int]:
        """Different values in runs of the base's columns, and values looked at; see `exporter.verify.weights.sums`."""
        different, looked_at = self._values[name]
        return different, looked_at


@dataclass(frozen=True)
class OpenedPack:
    """A reference pack while its files are open.

    Attributes:
        model: the merged model, without weights.
        sketches: what is known of those.
        prompts: what artifacts go on with.
        reference: what the trained model said; states and head are read as they are needed.
    """

    model: MergedModel
    sketches: StoredSketches
    prompts: tuple[Prompt, ...]
    reference: Reference


@contextmanager
def opened_pack(folder: Path, description: Description, name: str, device: str, threads: int) -> Iterator[OpenedPack]:
    """A pack, while its files are open.

    Args:
        folder: the pack.
        description: what `read_description` returned for it.
        name: what the model is called.
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
        head, last = StoredHead(stored["head"], reader, device), _array(reader, stored["prompt_states"], "<f4")
        model = packed_model(folder, name, description.files)
        yield OpenedPack(
            model,
            StoredSketches(stored, model, reader),
            _prompts(_array(reader, stored["prompt_ids"], "<i4"), description),
            Reference(windows, hidden, head, scores, torch.tensor(last, device=device)),
        )


def _prompts(ids: npt.NDArray[np.int32], description: Description) -> tuple[Prompt, ...]:
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
