"""Checks an output folder that was published: the files are the ones in its manifest, and they still score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from exporter.adapter import Adapter
from exporter.artifact.manifest import MANIFEST_NAME, verification_json
from exporter.artifact.staging import sha256
from exporter.backends.registry import backend_names, load_backend
from exporter.calibration import Windows, make_windows
from exporter.checkpoint import Checkpoint
from exporter.errors import ArtifactError
from exporter.model import MergedModel, plan_merge
from exporter.recipe import Calibration, Evaluation, Execution
from exporter.reporter import Reporter
from exporter.runtimes.base import check_endpoint, choose_runtime, load_runtime
from exporter.sources import resolve_adapter, resolve_base
from exporter.verify.check import compare_in
from exporter.verify.gate import Verification, gate_for, judge
from exporter.verify.weights import read_weights, weights_json

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
            label: verification_json(verdict) | {"weights": weights_json(verdict.weights)}
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
    manifest = read_manifest(folder)
    # A folder may be older than a runtime that serves it.
    serving = [
        choose_runtime((runtime,) if runtime else artifact.runtimes, endpoint=endpoint, wanted=runtime)
        for artifact in manifest.artifacts
    ]
    check_endpoint(endpoint, serving)
    check_files(folder, manifest)
    checkpoint = Checkpoint.open(resolve_base(base).folder)
    opened = tuple(Adapter.open(resolve_adapter(adapter).folder) for adapter in adapters)
    model = plan_merge(checkpoint, opened, manifest.name)
    windows = make_windows(calibration, evaluation, model.tokenizer)
    reference = _reference(model, windows, device, reporter)
    verdicts, sizes = {}, {}
    for artifact, name in zip(manifest.artifacts, serving, strict=True):
        label = f"{artifact.format} {artifact.quant}"
        scorer = load_runtime(name, device, endpoint)
        entry = folder if artifact.entry == "." else folder / artifact.entry
        # A folder may be of a package that is not here.
        known = artifact.format in backend_names()
        weights = (
            read_weights(load_backend(artifact.format), model, artifact.quant, entry, Execution().workers)
            if known
            else None
        )
        comparison = compare_in(scorer, entry, label, reference, reporter)
        gate = gate_for(label, artifact.quant, evaluation.gate)
        verdicts[label], sizes[label] = judge(scorer.version(), comparison, gate, weights), artifact.bytes
    reporter.scored()
    return PublishedResult(folder, sizes, verdicts)


def _reference(model: MergedModel, windows: Windows, device: str, reporter: Reporter) -> Reference:
    """Walk for the reference alone, and tell the reporter."""
    from exporter.verify.reference import score_reference

    reporter.walking(windows)

    def on_layer(done: int, layers: int) -> None:
        reporter.layer(done, layers)
        if done == layers:
            reporter.scoring("reference", windows)

    return score_reference(model, windows, device, reporter.window, threads=Execution().workers, on_layer=on_layer)


class _File(BaseModel):
    bytes: int
    sha256: str


class _Artifact(BaseModel):
    format: str
    quant: str
    entry: str
    runtimes: list[str]
    bytes: int


class _Manifest(BaseModel):
    """The part of `export.json` that this needs; docs/export.schema.json has the whole."""

    name: str
    artifacts: list[_Artifact] = Field(min_length=1)
    files: dict[str, _File]

    @model_validator(mode="after")
    def _inside(self) -> _Manifest:
        for name in [*self.files, *(artifact.entry for artifact in self.artifacts)]:
            path = PurePath(name)
            if path.is_absolute() or ".." in path.parts:
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


def check_files(folder: Path, manifest: _Manifest) -> None:
    """Every file of the manifest must be there, with its size and hash.

    Raises:
        ArtifactError: one is not.
    """
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(
                name, found="no such file", expected="every file of the manifest", remedy="Copy it again."
            )
        if file.stat().st_size != entry.bytes or (found := sha256(file)) != entry.sha256:
            size = file.stat().st_size
            raise ArtifactError(
                name,
                found=f"{size} bytes" if size != entry.bytes else f"sha256 {found[:16]}…",
                expected=f"{entry.bytes} bytes" if size != entry.bytes else f"sha256 {entry.sha256[:16]}…",
                remedy="The file was changed or damaged after publishing: copy or export it again.",
            )
