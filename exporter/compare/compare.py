"""Compares artifact folders by their manifests, and warns of figures that must not be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, model_validator

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.errors import ArtifactError
from exporter.publish.manifest_text import (
    change_text,
    divergence_text,
    loaded_bytes,
    share_text,
    survival_text,
    verdict_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from exporter.compare.speed import Speed


# Two references of one model differ by less, relatively, in perplexity.
_SAME_MODEL = 1e-3


@dataclass(frozen=True)
class Compared:
    """One artifact of one folder.

    Attributes:
        folder: the folder's name.
        model: the model's name.
        format: its backend.
        quant: its quantization type.
        bytes: bytes that a runtime loads.
        scores: its `verification` as the manifest has it.
        survival: share of the adapter's change that is stored, in words.
        verdict: `passed`, `failed`, `undecided` or `skipped`.
        tokens: hash of the evaluation tokens; None if nothing was scored.
        drawn: hash of the further tokens of its run, if some of them were scored for it; else None.
        tokens_scored: number of predictions that were scored for it; None if nothing was.
        speed: its speed, measured now; None if it was not measured.
    """

    folder: str
    model: str
    format: str
    quant: str
    bytes: int
    scores: Mapping[str, Any]
    survival: str
    verdict: str
    tokens: str | None
    drawn: str | None
    tokens_scored: int | None
    speed: Speed | None = None

    @property
    def label(self) -> str:
        """Short name, unique where folders have names of their own."""
        return f"{self.folder} {self.quant}"

    @property
    def scored_on(self) -> str | None:
        """The tokens that were scored for it, in words; None if there were none."""
        if self.tokens is None:
            return None
        beside = f" and {self.drawn[:8]}…" if self.drawn else ""
        many = "" if self.tokens_scored is None else f" ({self.tokens_scored:,} predictions)"
        return f"{self.tokens[:8]}…{beside}{many}"

    @property
    def divergence(self) -> float | None:
        """Mean KL divergence over the whole vocabulary, in nats."""
        spread = self.scores.get("kl_divergence")
        return None if spread is None else float(spread["mean"])

    @property
    def change(self) -> float | None:
        """Relative change of perplexity, up or down."""
        delta = self.scores.get("delta")
        return None if delta is None else abs(float(delta))


@dataclass(frozen=True)
class Comparison:
    """The compared artifacts.

    Attributes:
        artifacts: by size, the smallest first.
        warnings: which figures must not be compared, in words.
    """

    artifacts: tuple[Compared, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The artifacts and the warnings."""
        return {"artifacts": [asdict(artifact) for artifact in self.artifacts], "warnings": list(self.warnings)}

    def show(self, console: Console) -> None:
        """Print a row for each artifact, then the warnings."""
        from rich.markup import escape
        from rich.table import Table

        from exporter.units import size

        speeds = [artifact.speed for artifact in self.artifacts if artifact.speed]
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1))
        columns = ("folder", "artifact", "size", "change (95 % interval)", "KL", "same top", "delta kept", "verdict")
        for column in (*columns, *(_SPEEDS if speeds else ())):
            left = column in ("folder", "artifact", "verdict")
            table.add_column(column, justify="left" if left else "right", no_wrap=column != "folder")
        for artifact in self.artifacts:
            color = {"passed": "green", "failed": "red"}.get(artifact.verdict, "yellow")
            table.add_row(
                escape(artifact.folder),
                escape(f"{artifact.format} {artifact.quant}"),
                size(artifact.bytes),
                change_text(artifact.scores),
                divergence_text(artifact.scores),
                share_text(artifact.scores.get("same_top")),
                artifact.survival,
                f"[{color}]{escape(artifact.verdict)}[/]",
                *(_speed_cells(artifact.speed) if speeds else ()),
            )
        console.print(table)
        for runtime in dict.fromkeys(speed.runtime for speed in speeds):
            console.print(f"speed, one request at a time, in {escape(runtime)}", highlight=False, soft_wrap=True)
        for warning in self.warnings:
            console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)


_SPEEDS = ("prompt tok/s", "output tok/s")


def _speed_cells(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "-", "-"
    return f"{speed.prompt:.1f}", "-" if speed.output is None else f"{speed.output:.1f}"


def compare_folders(folders: Sequence[Path], speeds: Mapping[tuple[Path, str, str], Speed] | None = None) -> Comparison:
    """Read the manifests, published or rejected.

    Args:
        folders: output folders.
        speeds: from `exporter.compare.speed.measure_folders`. Speeds are this machine's, so no manifest has them.

    Raises:
        ArtifactError: a folder has no manifest, or one that cannot be read as one.
    """
    found = [
        replace(artifact, speed=(speeds or {}).get((folder, artifact.format, artifact.quant)))
        for folder in folders
        for artifact in _read(folder)
    ]
    found.sort(key=lambda artifact: (artifact.bytes, artifact.label))
    return Comparison(tuple(found), tuple(_warnings(found)))


def _read(folder: Path) -> list[Compared]:
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise ArtifactError(
            str(file), found="no such file", expected="the manifest of an artifact folder",
            remedy="Name folders that `exporter export` wrote, published or rejected.",
        )  # fmt: skip
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return [_compared(folder.resolve().name, manifest, artifact) for artifact in manifest["artifacts"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            str(file),
            found=" ".join(f"{type(error).__name__}: {error}".split())[:120],
            expected="a manifest as `exporter export` writes it",
            remedy="Copy or export the folder again.",
        ) from None


class _Spread(BaseModel, strict=True, allow_inf_nan=False):
    mean: float
    stderr: float | None = None


class _TopK(_Spread):
    k: int


class _Scores(BaseModel, strict=True, allow_inf_nan=False):
    """The part of `verification` that is compared; docs/export.schema.json has the whole."""

    not_scored: str | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    tokens_scored: int | None = None
    delta: float | None = None
    delta_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    same_top: float | None = None
    kl_divergence: _Spread | None = None
    top_k_divergence: _TopK | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Scores:
        if self.perplexity is not None and (self.reference_perplexity is None or self.delta is None):
            raise ValueError("a perplexity without the trained model's, or without their difference")
        return self


class _Drawn(BaseModel, strict=True):
    sha256: str


class _Evaluation(BaseModel, strict=True):
    sha256: str
    tokens_scored: int
    drawn: _Drawn | None = None


def _compared(folder: str, manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> Compared:
    scores, on = _Scores.model_validate(artifact["verification"]), manifest.get("evaluation")
    evaluation = None if on is None or scores.perplexity is None else _Evaluation.model_validate(on)
    tokens_scored = scores.tokens_scored or (evaluation.tokens_scored if evaluation else None)
    more = evaluation is not None and tokens_scored != evaluation.tokens_scored
    return Compared(
        folder=folder,
        model=str(manifest["name"]),
        format=str(artifact["format"]),
        quant=str(artifact["quant"]),
        bytes=loaded_bytes(manifest, artifact),
        scores=dict(artifact["verification"]),
        survival=survival_text(artifact),
        verdict=verdict_of(artifact),
        tokens=evaluation.sha256 if evaluation else None,
        drawn=evaluation.drawn.sha256 if evaluation and evaluation.drawn and more else None,
        tokens_scored=tokens_scored if evaluation else None,
    )


def _warnings(artifacts: Sequence[Compared]) -> list[str]:
    """Reasons why figures of two artifacts do not compare."""
    warnings = []
    by_tokens: dict[tuple[str, str | None, int | None], list[Compared]] = {}
    for artifact in artifacts:
        if artifact.tokens is not None:
            # An artifact got the first windows that its run drew: the number of predictions says how many.
            key = artifact.tokens, artifact.drawn, artifact.tokens_scored
            by_tokens.setdefault(key, []).append(artifact)
    if len(by_tokens) > 1:
        groups = "; ".join(
            f"{', '.join(each.label for each in group)} on {group[0].scored_on}" for group in by_tokens.values()
        )
        warnings.append(f"scored on different tokens, so that no figure of one compares with another's: {groups}")
    for group in by_tokens.values():
        references = sorted(float(each.scores["reference_perplexity"]) for each in group)
        # Devices and versions differ in the last digits.
        if references[-1] > references[0] * (1 + _SAME_MODEL):
            ends = f"{references[0]:.4f} and {references[-1]:.4f}"
            warnings.append(f"held against different models, whose perplexities on the same tokens are {ends}")
    coarse = [artifact.label for artifact in artifacts if artifact.scores.get("top_k_divergence")]
    if coarse:
        warnings.append(
            f"the KL of {', '.join(coarse)} is in the top-k form, a lower bound: never compare it with the full form"
        )
    for artifact in artifacts:
        if reason := artifact.scores.get("not_scored"):
            warnings.append(f"{artifact.label}: {reason}")
    if skipped := [artifact.label for artifact in artifacts if artifact.verdict == "skipped"]:
        warnings.append(f"not verified: {', '.join(skipped)}")
    return warnings
