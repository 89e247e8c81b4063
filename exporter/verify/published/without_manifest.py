"""An artifact that came without a manifest: what it says of itself, in as much of one as scoring it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.backends.gguf.file_types import FILE_TYPES
from exporter.backends.gguf.header_reader import read_header as read_gguf_header
from exporter.backends.gptq.recognize import gptq_type, parameters_of
from exporter.backends.safetensors.backend import DTYPES
from exporter.errors import ArtifactError, ReferencePackError, UnsupportedModelError
from exporter.inputs.checkpoint import read_header, read_json
from exporter.plan.reporter import Reporter
from exporter.verify.candidates import Candidate, read_all_weights
from exporter.verify.published.manifest_record import MergeRecord, PublishedArtifact, PublishedManifest
from exporter.verify.weights.check import WeightsResult
from exporter.verify.weights.sketch_check import against

if TYPE_CHECKING:
    from exporter.reference.pack.reader import OpenedPack


NOTE = "there is no export.json beside it: whether the pack is of its base and adapters is not known"


def is_bare(artifact: Path) -> bool:
    """Whether a path is an artifact by itself: a file, or a model folder without a manifest."""
    return artifact.is_file() or ((artifact / "config.json").is_file() and not (artifact / MANIFEST_NAME).exists())


def bare_manifest(artifact: Path, vocabulary: int) -> PublishedManifest:
    """What is known of it: format, type and number of parameters. Its files have no hashes to be checked by.

    Args:
        artifact: a GGUF file, or a model folder.
        vocabulary: rows of the head that it is to be scored with.

    Raises:
        ArtifactError: it is neither, or does not say what it is.
        CheckpointError: its configuration or the header of one of its files cannot be read.
        ReferencePackError: it has fewer tokens, so the head is of another model.
    """
    return _gguf(artifact, vocabulary) if artifact.is_file() else _folder(artifact, vocabulary)


def _gguf(file: Path, vocabulary: int) -> PublishedManifest:
    header = read_gguf_header(file)
    quant = next((name for name, one in FILE_TYPES.items() if one.number == header.file_type), None)
    if quant is None:
        raise ArtifactError(
            file.name, found=f"file type {header.file_type}", expected=f"one of {', '.join(FILE_TYPES)}",
            remedy="Limits are by type: only these have any.",
        )  # fmt: skip
    _check_vocabulary(file, len(header.metadata.get("tokenizer.ggml.tokens") or ()), vocabulary)
    parameters = sum(prod(tensor.shape) for tensor in header.tensors.values())
    return _manifest(file, "gguf", quant, file.name, ["llamacpp"], parameters)


def _folder(folder: Path, vocabulary: int) -> PublishedManifest:
    config = read_json(folder / "config.json")
    _check_vocabulary(folder, int(config.get("vocab_size") or 0), vocabulary)
    tensors = {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in read_header(file).items()}
    if not tensors:
        raise ArtifactError(
            str(folder), found="no safetensors file", expected="the model's weights", remedy="Check the path."
        )
    quantization = config.get("quantization_config")
    if quantization is None:
        kinds = {name: sum(t.nbytes for t in tensors.values() if t.dtype == dtype) for name, dtype in DTYPES.items()}
        form, quant = "safetensors", max(kinds, key=lambda name: kinds[name])
    elif isinstance(quantization, dict) and (named := gptq_type(quantization)):
        form, quant = "gptq", named
    else:
        raise ArtifactError(
            "config.json: quantization_config", found=json.dumps(quantization)[:100], expected="GPTQ, or none",
            remedy="Only what this program writes has limits.",
        )  # fmt: skip
    parameters = sum(parameters_of(name, one, quantization or {}) for name, one in tensors.items())
    return _manifest(folder, form, quant, ".", ["vllm", "transformers"], parameters)


def _check_vocabulary(artifact: Path, tokens: int, vocabulary: int) -> None:
    """A file may hold more or fewer rows than the head, which may be padded; but not so many fewer."""
    if abs(tokens - vocabulary) > vocabulary // 100:
        raise ReferencePackError(
            artifact.name, found=f"{tokens:,} tokens", expected=f"{vocabulary:,}, as many as the pack's head has rows",
            remedy="Give the pack of the model that it was made from.",
        )  # fmt: skip


def _manifest(
    artifact: Path, form: str, quant: str, entry: str, runtimes: list[str], parameters: int
) -> PublishedManifest:
    files = [artifact] if artifact.is_file() else list(artifact.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    # Not validated: its entry is not among files with hashes, as there are none.
    return PublishedManifest.model_construct(
        name=artifact.stem,
        merge=MergeRecord(parameters=parameters),
        artifacts=[PublishedArtifact(format=form, quant=quant, entry=entry, runtimes=runtimes, bytes=nbytes)],
        files={},
    )


def read_foreign(
    candidate: Candidate, pack: OpenedPack, reporter: Reporter, threads: int
) -> tuple[WeightsResult | None, list[str]]:
    """Read back an artifact that came without a manifest, and may be another program's: what its files say otherwise
    than the pack is told and is no fault, since they may say it in other words.

    Args:
        candidate: the artifact.
        pack: what is known of the trained model.
        reporter: told about it.
        threads: threads that compute.

    Returns:
        What is in its weights, and what to say of its files.
    """
    try:
        (found,) = read_all_weights([candidate], pack.model, reporter, threads, against(pack))
    except UnsupportedModelError as error:
        return None, [f"its weights were not looked at: {error.thing} is {error.found}"]
    if found is None or not found.faults:
        return found, []
    more = f" and {len(found.faults) - 3} more" if len(found.faults) > 3 else ""
    return replace(found, faults=()), [f"its files say otherwise than the pack: {'; '.join(found.faults[:3])}{more}"]
