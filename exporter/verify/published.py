"""Checks an output folder that was published: the files are the ones in its manifest, and they still score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from exporter.adapter import Adapter
from exporter.artifact.files import FileRecord, check_files, is_inside
from exporter.artifact.manifest import MANIFEST_NAME, verification_json
from exporter.backends.registry import backend_names, load_backend
from exporter.calibration import make_windows
from exporter.checkpoint import Checkpoint
from exporter.errors import ArtifactError
from exporter.model import MergedModel, plan_merge
from exporter.recipe import Calibration, Evaluation, Execution, Limits
from exporter.reporter import Reporter
from exporter.runtimes.base import check_endpoint, choose_runtime, load_runtime
from exporter.sources import resolve_adapter, resolve_base
from exporter.verify.answers.run import Served, answers_of, with_answers
from exporter.verify.check import Candidate, DrawnTokens, MoreTokens, NoMoreTokens, judge_candidates
from exporter.verify.gate import Verification
from exporter.verify.limits import gate_for
from exporter.verify.pack import InputRecord, check_belongs, read_description
from exporter.verify.standalone import walk_reference
from exporter.verify.weights import weights_json

if TYPE_CHECKING:
    from rich.console import Console

    from exporter.verify.reference import Reference


@dataclass(frozen=True)
class PublishedResult:
    """Verdicts on the artifacts of a published folder.

    Attributes:
        folder: the folder.
        sizes: bytes of each artifact, by label.
        verdicts: by artifact label.
    """

    folder: Path
    sizes: dict[str, int]
    verdicts: dict[str, Verification]

    @property
    def passed(self) -> bool:
        """Whether every artifact passed."""
        return all(verdict.passed for verdict in self.verdicts.values())

    def as_json(self) -> dict[str, Any]:
        """The verdicts as JSON, by artifact label."""
        return {
            label: verification_json(verdict)
            | {"weights": weights_json(verdict.weights)}
            | {"answers": verdict.answers.as_json() if verdict.answers else None}
            for label, verdict in self.verdicts.items()
        }

    def show(self, console: Console) -> None:
        """Print the verdict table."""
        from exporter.screen import show_table

        show_table(console, self.verdicts, self.sizes)


def verify_published(
    folder: Path,
    base: str,
    adapters: tuple[str, ...],
    calibration: Calibration,
    evaluation: Evaluation,
    runtime: str | None,
    device: str,
    reporter: Reporter,
    endpoint: str | None = None,
) -> PublishedResult:
    """Check hashes, then score every artifact against base and adapters, on evaluation windows of `calibration`'s text.

    Args:
        folder: what was published.
        base: a folder or a hub id.
        adapters: likewise.
        evaluation: what is scored.
        runtime: what scores, whether the manifest lists it or not; None for the first of the manifest's that is here.
        device: where reference and transformers compute.
        reporter: told about every window.
        endpoint: address of a running vLLM server to score with.

    Raises:
        RecipeError: the runtime is unknown or not here, or the endpoint is of no use.
        ArtifactError: there is no manifest, or a file is missing or is not the one that was published.
        RefusalError: base or adapters cannot be read, or do not fit.
        RuntimeScoreError: a runtime cannot load or run an artifact.
    """
    manifest, serving = _open(folder, runtime, endpoint)
    check_files(folder, manifest.files)
    model = open_trained(base, adapters, manifest.name)
    windows = make_windows(calibration, evaluation, model.tokenizer)
    threads = Execution().workers
    reference = walk_reference(model, windows, device, reporter, threads=threads)
    text, as_cut = manifest.calibrated_on(calibration, evaluation)
    more = DrawnTokens(
        model, text, as_cut, windows, device, reporter, calibrated=manifest.calibration is not None, threads=threads
    )
    return _judge(
        folder,
        manifest,
        serving,
        reference,
        evaluation.gate,
        device,
        endpoint,
        reporter,
        more,
        trained=model,
        answers=evaluation.answers,
    )


def verify_with_pack(
    folder: Path,
    pack: Path,
    gate: Mapping[str, float | Limits],
    runtime: str | None,
    device: str,
    reporter: Reporter,
    endpoint: str | None = None,
) -> PublishedResult:
    """Check hashes, then score every artifact against a reference pack, on the pack's windows.

    Its weights are not read, and it is not asked for answers: a pack holds neither the merged weights nor what the
    trained model would have said along the answers.

    Args:
        folder: what was published.
        pack: the folder of a reference pack that was made from the same base and adapters.
        gate: limits in place of the built-in ones, as in `Evaluation`.
        runtime: as in `verify_published`.
        device: where the reference's logits and transformers compute.
        reporter: told about every window.
        endpoint: address of a running vLLM server to score with.

    Raises:
        RecipeError: the runtime is unknown or not here, or the endpoint is of no use.
        ArtifactError: there is no manifest, or a file is missing or is not the one that was published.
        ReferencePackError: the same of the pack; or it was made from another base or other adapters.
        RuntimeScoreError: a runtime cannot load or run an artifact.
    """
    manifest, serving = _open(folder, runtime, endpoint)
    description = read_description(pack)
    check_belongs(description, folder.resolve().name, manifest.inputs)
    check_files(folder, manifest.files)
    from exporter.verify.packing import opened_reference

    with opened_reference(pack, description, device, Execution().workers) as reference:
        return _judge(folder, manifest, serving, reference, gate, device, endpoint, reporter, NoMoreTokens())


def open_trained(base: str, adapters: tuple[str, ...], name: str) -> MergedModel:
    """The trained model that base and adapters make; its tensors are not read yet.

    Args:
        base: a folder or a hub id.
        adapters: likewise.
        name: what it is called.

    Raises:
        RefusalError: they cannot be read, or do not fit.
    """
    checkpoint = Checkpoint.open(resolve_base(base).folder)
    opened = tuple(Adapter.open(resolve_adapter(adapter).folder) for adapter in adapters)
    return plan_merge(checkpoint, opened, name)


def _open(folder: Path, runtime: str | None, endpoint: str | None) -> tuple[_Manifest, list[str]]:
    """The manifest, and the runtime that will score each artifact. A folder may be older than one that serves it."""
    manifest = read_manifest(folder)
    serving = [
        choose_runtime((runtime,) if runtime else artifact.runtimes, endpoint=endpoint, wanted=runtime)
        for artifact in manifest.artifacts
    ]
    check_endpoint(endpoint, serving)
    return manifest, serving


def _judge(
    folder: Path,
    manifest: _Manifest,
    serving: Sequence[str],
    reference: Reference,
    limits: Mapping[str, float | Limits],
    device: str,
    endpoint: str | None,
    reporter: Reporter,
    more: MoreTokens,
    *,
    trained: MergedModel | None = None,
    answers: bool = False,
) -> PublishedResult:
    """Score and judge every artifact; with the trained model at hand, read its weights and ask for answers as well."""
    here, threads = backend_names(), Execution().workers
    # A reference pack was found to be of the same inputs, so the manifest's count is the pack's model's.
    parameters = trained.parameters if trained else manifest.merge.parameters
    candidates = [
        Candidate(
            f"{artifact.format} {artifact.quant}",
            artifact.quant,
            folder if artifact.entry == "." else folder / artifact.entry,
            load_runtime(name, device, endpoint),
            gate_for(f"{artifact.format} {artifact.quant}", artifact.quant, limits, parameters),
            # A folder may be of a package that is not here.
            load_backend(artifact.format) if artifact.format in here else None,
        )
        for artifact, name in zip(manifest.artifacts, serving, strict=True)
    ]
    verdicts = judge_candidates(candidates, trained, reference, more, reporter, threads)
    if trained is not None and answers:
        served = [Served(one.label, one.entry, one.runtime) for one in candidates]
        answered = answers_of(trained, served, device, reporter, threads=threads)
        verdicts = [with_answers(one, found) for one, found in zip(verdicts, answered, strict=True)]
    labels = [one.label for one in candidates]
    sizes = [artifact.bytes for artifact in manifest.artifacts]
    return PublishedResult(folder, dict(zip(labels, sizes, strict=True)), dict(zip(labels, verdicts, strict=True)))


class _Artifact(BaseModel):
    format: str
    quant: str
    entry: str
    runtimes: list[str]
    bytes: int


class _CalibrationRecord(BaseModel):
    tokens: int
    window: int
    seed: int


class _EvaluationRecord(BaseModel):
    tokens: int
    n_ctx: int


class _Recipe(BaseModel):
    calibration: _CalibrationRecord
    evaluation: _EvaluationRecord


class _Merge(BaseModel):
    parameters: int


class _Manifest(BaseModel):
    """The part of `export.json` that this needs; docs/export.schema.json has the whole."""

    name: str
    merge: _Merge
    artifacts: list[_Artifact] = Field(min_length=1)
    files: dict[str, FileRecord]
    inputs: list[InputRecord] = []
    calibration: dict[str, Any] | None = None
    recipe: _Recipe | None = None

    def calibrated_on(self, text: Calibration, evaluation: Evaluation) -> tuple[Calibration, Evaluation]:
        """The text cut as it was then, and as many tokens to be scored as now."""
        if self.recipe is None:
            return text, evaluation
        then, scored = self.recipe.calibration, self.recipe.evaluation.tokens
        update = {"max_tokens": max(evaluation.max_tokens, evaluation.tokens), "tokens": scored}
        return text.model_copy(update=then.model_dump()), evaluation.model_copy(update=update)

    @model_validator(mode="after")
    def _inside(self) -> _Manifest:
        for name in [*self.files, *(artifact.entry for artifact in self.artifacts)]:
            if not is_inside(name):
                raise ValueError(f"{name} is outside of the folder")
        for artifact in self.artifacts:
            if artifact.entry != "." and artifact.entry not in self.files:
                raise ValueError(f"{artifact.entry} is not among the files")
        return self


def read_manifest(folder: Path) -> _Manifest:
    """The manifest of a published folder.

    Raises:
        ArtifactError: there is none, or it is not a manifest.
    """
    file = folder / MANIFEST_NAME
    try:
        return _Manifest.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            str(file),
            found=str(error).splitlines()[0],
            expected="the manifest of a published folder",
            remedy="Check the path, or export again.",
        ) from None
