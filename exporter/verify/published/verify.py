"""Checks an output folder that was published: the files are the ones in its manifest, and they still score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifact.file_records import check_files
from exporter.backends.registry import find_backend
from exporter.plan.estimate import FEWER_TOKENS, PlannedWalk
from exporter.plan.gate_limits import check_types, gate_for
from exporter.plan.open_model import open_trained
from exporter.plan.reporter import Reporter
from exporter.plan.resources import check_device_memory, check_memory, states_budget
from exporter.recipe import Calibration, Evaluation, Execution, Limits
from exporter.reference.further_tokens import DrawnTokens, PackTokens, scratch_folder
from exporter.reference.pack.description import check_belongs, read_description
from exporter.reference.predictions import walk_reference
from exporter.runtimes.registry import check_endpoint, load_runtime
from exporter.tokens.positions import check_windows
from exporter.tokens.windows import check_drawable, make_windows
from exporter.tour.walk.background_import import walk_imported
from exporter.verify.answers.run import PackedReference, Served, TrainedModel, WalkedModel, answers_of
from exporter.verify.candidates import Candidate, judge_candidates, read_all_weights
from exporter.verify.gate import Verification, with_answers
from exporter.verify.published.manifest_record import PublishedManifest, read_manifest
from exporter.verify.published.without_manifest import NOTE as BARE_NOTE
from exporter.verify.published.without_manifest import bare_manifest, is_bare
from exporter.verify.results_json import evaluation_json, verification_json
from exporter.verify.weights.as_json import weights_json


@dataclass(frozen=True)
class PublishedResult:
    """Verdicts on the artifacts of a published folder.

    Attributes:
        folder: the folder.
        sizes: bytes of each artifact, by label.
        verdicts: by artifact label.
        evaluation: what was scored, as in a manifest; None if nothing was.
        notes: what the reader should know of the tokens that were scored.
        by_reference: whether a reference pack stood in for the trained model, so that what is said of the weights is
            estimated from a sketch of them.
    """

    folder: Path
    sizes: dict[str, int]
    verdicts: dict[str, Verification]
    evaluation: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    by_reference: bool = False

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
            | {"evaluation": self.evaluation, "notes": list(self.notes), "by_reference": self.by_reference}
            for label, verdict in self.verdicts.items()
        }


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

    No token is scored that the artifacts were calibrated on, if the text is theirs.

    Args:
        folder: what was published.
        base: a folder or a hub id.
        adapters: likewise.
        calibration: the text; if it was not set, that of the export.
        evaluation: what is scored; tokens and window are those of the export, as far as they were not set.
        runtime: what scores, whether the manifest lists it or not; None for the first of the manifest's that is here.
        device: where reference and transformers compute.
        reporter: told about every window.
        endpoint: address of a running vLLM server to score with.

    Raises:
        RecipeError: the runtime is unknown or not here, the endpoint is of no use, a limit is of no artifact's type, or
            the export's text is not here.
        ArtifactError: there is no manifest, or a file is missing or is not the one that was published.
        RefusalError: base or adapters cannot be read, or do not fit; or there is too little memory.
        RuntimeScoreError: a runtime cannot be had or run, or one that the manifest does not list cannot load an
            artifact; one that it lists and that cannot is a verdict.
    """
    manifest = read_manifest(folder)
    serving = _serving(folder, manifest, evaluation.gate, runtime, endpoint)
    check_files(folder, manifest.files)
    model, threads = open_trained(base, adapters, manifest.name), Execution().workers
    text, evaluation = manifest.as_exported(calibration, evaluation)
    check_windows(model.config, evaluation=evaluation.n_ctx, calibration=None)
    cut, notes = manifest.held_against(text, model.tokenizer)
    windows = make_windows(text, evaluation, model.tokenizer, cut=cut)
    check_drawable(text, evaluation, model.tokenizer, windows, cut=cut)
    walk = PlannedWalk.for_reference(model, windows, "float32", states_budget())
    check_device_memory(device, walk.device_memory)
    check_memory(walk.memory, lambda: {name: one for name, one in walk.lighter().items() if name == FEWER_TOKENS})
    candidates = _candidates(folder, manifest, serving, evaluation.gate, model.parameters, device, endpoint)
    with walk_imported(model):
        weights = read_all_weights(candidates, model, reporter, threads)
    with scratch_folder(walk) as scratch:
        reference = walk_reference(
            model, windows, device, reporter, threads=threads, scratch=scratch, keep_bytes=walk.keep_bytes
        )
    more = DrawnTokens(model, text, evaluation, reference, device, reporter, cut=cut, threads=threads)
    verdicts = judge_candidates(candidates, weights, reference, more, reporter)
    if evaluation.answers:
        verdicts = _answered(WalkedModel(model, device, threads), candidates, verdicts, reporter)
    scored, by_label = evaluation_json(windows, more.drawn), _by_label(candidates, verdicts)
    return PublishedResult(folder, manifest.sizes, by_label, scored, tuple(notes))


def verify_with_pack(
    artifact: Path,
    pack: Path,
    gate: Mapping[str, float | Limits],
    runtime: str | None,
    device: str,
    reporter: Reporter,
    endpoint: str | None = None,
    *,
    answers: bool = True,
) -> PublishedResult:
    """Check hashes, then score every artifact against a reference pack, on the pack's windows.

    What its files say of the model is held against the pack, its weights against their sketch there, and its answers:
    tokens, renderings, end tokens, and the first token of each continuation. An artifact without a manifest is taken at
    its own word, and whether the pack is of its base is not known then.

    Args:
        artifact: a folder that was published; or a GGUF file or a model folder by itself.
        pack: the folder of a reference pack that was made from the same base and adapters.
        gate: limits in place of the built-in ones, as in `Evaluation`.
        runtime: as in `verify_published`.
        device: where the reference's logits and transformers compute.
        reporter: told about every window.
        endpoint: address of a running vLLM server to score with.
        answers: whether to ask for answers.

    Raises:
        RecipeError: the runtime is unknown or not here, the endpoint is of no use, or a limit is of no artifact's type.
        ArtifactError: there is nothing that says what it is, or a file is missing or is not the one that was published.
        ReferencePackError: the same of the pack; or it is of another vocabulary, another base or other adapters.
        RuntimeScoreError: as in `verify_published`.
    """
    description, bare = read_description(pack), is_bare(artifact)
    folder = artifact.parent if artifact.is_file() else artifact
    manifest = bare_manifest(artifact, description.vocabulary) if bare else read_manifest(artifact)
    serving = _serving(folder, manifest, gate, runtime, endpoint)
    if not bare:
        check_belongs(description, folder.resolve().name, manifest.inputs)
        check_files(folder, manifest.files)
    from exporter.reference.pack.reader import opened_pack
    from exporter.verify.published.without_manifest import read_foreign
    from exporter.verify.weights.sketch_check import against

    threads = Execution().workers
    # The pack is of the same inputs, so the artifact's count of parameters is its model's.
    candidates = _candidates(folder, manifest, serving, gate, manifest.merge.parameters, device, endpoint)
    with opened_pack(pack, description, manifest.name, device, threads) as opened:
        said: list[str] = []
        if bare:
            found, said = read_foreign(candidates[0], opened, reporter, threads)
            weights = [found]
        else:
            weights = read_all_weights(candidates, opened.model, reporter, threads, against(opened))
        more = PackTokens(opened.reference, description.evaluation.first)
        verdicts = judge_candidates(candidates, weights, more.first, more, reporter)
        if answers:
            trained = PackedReference(opened.model, opened.prompts, opened.reference)
            verdicts = _answered(trained, candidates, verdicts, reporter)
        windows, drawn = more.first.windows, more.drawn
        tokens = windows.tokens + (drawn.tokens if drawn else 0)
        notes = [BARE_NOTE, *said] if bare else manifest.held_against_pack(windows.source, tokens)
        scored, by_label = evaluation_json(windows, drawn), _by_label(candidates, verdicts)
        return PublishedResult(folder, manifest.sizes, by_label, scored, tuple(notes), by_reference=True)


def _answered(
    trained: TrainedModel, candidates: Sequence[Candidate], verdicts: Sequence[Verification], reporter: Reporter
) -> list[Verification]:
    """The verdicts with the answers of all that could be scored."""
    served = [
        Served(one.label, one.entry, one.runtime) if verdict.comparison else None
        for one, verdict in zip(candidates, verdicts, strict=True)
    ]
    answered = answers_of(trained, served, reporter)
    return [with_answers(one, found) for one, found in zip(verdicts, answered, strict=True)]


def _serving(
    folder: Path,
    manifest: PublishedManifest,
    gate: Mapping[str, float | Limits],
    runtime: str | None,
    endpoint: str | None,
) -> list[str]:
    """The runtime that will score each artifact. A folder may be older than one that serves it."""
    check_types(gate, [artifact.quant for artifact in manifest.artifacts])
    serving = [artifact.runtime(folder, endpoint, runtime) for artifact in manifest.artifacts]
    check_endpoint(endpoint, serving)
    return serving


def _candidates(
    folder: Path,
    manifest: PublishedManifest,
    serving: Sequence[str],
    limits: Mapping[str, float | Limits],
    parameters: int,
    device: str,
    endpoint: str | None,
) -> list[Candidate]:
    return [
        Candidate(
            artifact.label,
            artifact.quant,
            artifact.path(folder),
            load_runtime(name, device, endpoint),
            gate_for(artifact.label, artifact.quant, limits, parameters),
            # A folder may be of a package that is not here.
            find_backend(artifact.format),
            served=name in artifact.runtimes,
            checksums=artifact.checksums,
        )
        for artifact, name in zip(manifest.artifacts, serving, strict=True)
    ]


def _by_label(candidates: Sequence[Candidate], verdicts: Sequence[Verification]) -> dict[str, Verification]:
    return {one.label: verdict for one, verdict in zip(candidates, verdicts, strict=True)}
