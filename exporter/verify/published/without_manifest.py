"""An artifact that came without a manifest: what it says of itself, in as much of one as scoring it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.backends.recognized import Recognized
from exporter.backends.registry import backend_names, load_backend
from exporter.errors import ArtifactError, BackendError, ReferencePackError, UnsupportedModelError
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
        artifact: a file or a model folder.
        vocabulary: rows of the head that it is to be scored with.

    Raises:
        ArtifactError: no backend recognizes it, or it does not say what it is.
        CheckpointError: its configuration or the header of one of its files cannot be read.
        ReferencePackError: it has fewer tokens, so the head is of another model.
    """
    form, found = _recognized(artifact)
    _check_vocabulary(artifact, found.vocabulary, vocabulary)
    published = PublishedArtifact(
        format=form, quant=found.quant, entry=found.entry, runtimes=list(found.runtimes), bytes=found.nbytes
    )
    # Not validated: its entry is not among files with hashes, as there are none.
    return PublishedManifest.model_construct(
        name=artifact.stem, merge=MergeRecord(parameters=found.parameters), artifacts=[published], files={}
    )


def _recognized(artifact: Path) -> tuple[str, Recognized]:
    """The format of an artifact, and what its backend says of it.

    Raises:
        ArtifactError: no backend recognizes it; if one said why, with its words.
    """
    refusals: list[ArtifactError] = []
    for name in backend_names():
        try:
            found = load_backend(name).recognize(artifact)
        except BackendError:
            # A broken package takes no other format down.
            continue
        except ArtifactError as error:
            refusals.append(error)
            continue
        if found is not None:
            return name, found
    if refusals:
        raise refusals[0]
    raise ArtifactError(
        str(artifact), found="an artifact that no format recognizes",
        expected="one of " + ", ".join(backend_names()), remedy="Install the package that provides its format.",
    )  # fmt: skip


def _check_vocabulary(artifact: Path, tokens: int, vocabulary: int) -> None:
    """A file may hold more or fewer rows than the head, which may be padded; but not so many fewer."""
    if abs(tokens - vocabulary) > vocabulary // 100:
        raise ReferencePackError(
            artifact.name, found=f"{tokens:,} tokens", expected=f"{vocabulary:,}, as many as the pack's head has rows",
            remedy="Give the pack of the model that it was made from.",
        )  # fmt: skip


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
