"""The plan of a run as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.backends.base import Backend
from exporter.backends.output_plan import OutputPlan
from exporter.inputs.sources import Source
from exporter.merge.model import MergedModel
from exporter.plan.estimate import PlannedWalk
from exporter.plan.reference_pack import PackPlan
from exporter.recipe import Execution, Recipe
from exporter.tokens.windows import TokenSets


@dataclass(frozen=True)
class FolderPlan:
    """One output folder and the artifacts in it.

    Attributes:
        out: the folder that publishing creates.
        backend: the backend that writes it.
        artifacts: one for each quantization type.
        options: the backend's options, as they were asked for.
        runtimes: the runtime that will score each artifact, by label (unique within this folder only). Empty without
            verification.
    """

    out: Path
    backend: Backend
    artifacts: tuple[OutputPlan, ...]
    options: Mapping[str, Any]
    runtimes: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(artifact.nbytes for artifact in self.artifacts)

    @property
    def temporary_bytes(self) -> int:
        """Bytes that are needed beside its files while they are made."""
        return sum(artifact.temporary_bytes for artifact in self.artifacts)


@dataclass(frozen=True)
class ExportPlan:
    """What a run will read, write, need and check.

    Attributes:
        recipe: what was asked for.
        execution: how it will run.
        base: the base's source.
        adapters: the adapters' sources.
        model: the merged model.
        folders: the output folders.
        threads: worker threads.
        tokens: evaluation and calibration windows.
        merge_bytes: estimated peak memory of merging and writing.
        walk: what the walk takes, if anything needs activations.
        seconds: rough duration on this machine.
        pack: the reference pack that is kept, or None.
    """

    recipe: Recipe
    execution: Execution
    base: Source
    adapters: tuple[Source, ...]
    model: MergedModel
    folders: tuple[FolderPlan, ...]
    threads: int
    tokens: TokenSets
    merge_bytes: int
    walk: PlannedWalk
    seconds: float
    pack: PackPlan | None = None

    @property
    def artifacts(self) -> tuple[OutputPlan, ...]:
        """All artifacts of all folders."""
        return tuple(artifact for folder in self.folders for artifact in folder.artifacts)

    @property
    def walks(self) -> bool:
        """Whether something needs activations, so that the tour walks through the layers."""
        return self.walk.walks

    @property
    def walk_bytes(self) -> int:
        """Estimated peak memory of the walk, 0 if nothing needs activations."""
        return self.walk.memory

    @property
    def scratch_bytes(self) -> int:
        """Disk that the walk takes for a while, in the staging folder of the first output."""
        return self.walk.scratch_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files that will be written, including those that are removed again."""
        kept = self.pack.nbytes if self.pack else 0
        return sum(folder.nbytes + folder.temporary_bytes for folder in self.folders) + self.scratch_bytes + kept

    @property
    def input_bytes(self) -> int:
        """Bytes of the base's tensors."""
        return self.model.base.nbytes
