"""The tour of an export: the base is read once, and all who need tensors, statistics or hidden states ride along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exporter.artifact.hashing import InputHasher
from exporter.artifact.staging import Staging
from exporter.backends.base import Finding, Writer, WriteResult, overrides
from exporter.backends.output_plan import OutputPlan
from exporter.errors import BackendError
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.device import make_merger, resolve_device
from exporter.pipeline.job import Job
from exporter.plan.export_plan import ExportPlan
from exporter.plan.reporter import Reporter
from exporter.plan.resources import check_device_memory
from exporter.publish.manifest import input_files
from exporter.reference.predictions import Reference, evaluation_group, finish_reference, prompt_groups
from exporter.tour.riders import Passengers, Rider, Settings, Solver
from exporter.tour.stream import Progress, Stream
from exporter.tour.walk.hidden_states import Group
from exporter.tour.walk.resume import forget_progress
from exporter.tour.walk.walk import Walk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Toured:
    """What the tour brings back, beside the files.

    Attributes:
        reference: the trained model's scores, or None without verification.
        device: where it was computed.
        inputs: SHA-256 of every input file, by path.
    """

    reference: Reference | None
    device: str
    inputs: Mapping[Path, str]


def run_tour(plan: ExportPlan, jobs: Sequence[Job], hasher: InputHasher, reporter: Reporter) -> Toured:
    """Merge and write every tensor, and walk if anything needs activations.

    Args:
        plan: the run's plan.
        jobs: its output folders; each is given the result of its artifacts.
        hasher: told about each file of the base as the tour gets to it; at the end it gives the hashes of all inputs.
        reporter: told about bytes, layers and windows.

    Raises:
        RefusalError: the inputs turned out to be wrong on the way (a NaN in the base, say).
        ExporterError: something failed on the way.
    """
    device = resolve_device(plan.execution.device)
    check_device_memory(device, plan.walk.device_memory)
    with ExitStack() as stack:
        boarded = [
            _Boarded.board(number, job, artifact) for number, job in enumerate(jobs) for artifact in job.plan.artifacts
        ]
        for one in boarded:
            stack.callback(one.writer.close)
            one.writer.place(device, plan.threads)
        passengers = Passengers(
            [one.rider for one in boarded if one.rider],
            [one.observer for one in boarded if one.observer],
            [one.solver for one in boarded if one.solver],
        )
        reporter.touring(plan, device, resumed=any(job.staging.resumed for job in jobs))
        stream = Stream(
            plan.model,
            [*passengers.riders, *passengers.observers],
            make_merger(device, stack.enter_context(TensorReader())),
            threads=plan.threads,
            block_bytes=plan.execution.block_bytes,
            progress=Progress(read=reporter.read, reached=hasher.reach),
        )
        stack.callback(stream.close)
        reference: Reference | None = None
        findings: Mapping[str, Sequence[Finding]] = {}
        if plan.walks:
            walk = _walk(plan, stream, passengers, [job.staging for job in jobs], device, reporter)
            walked = walk.run()
            findings = walked.findings
        else:
            stream.offer(plan.model.tensors)
            stream.finish()
        for job in jobs:
            job.written = {one.plan.label: one.finish(plan, findings) for one in boarded if one.job is job}
        reporter.toured()
        if plan.walks and plan.tokens.evaluation is not None:
            reference = finish_reference(walk, walked, plan.tokens.evaluation, device)
        return Toured(reference, device, hasher.finish(path for _, path in input_files(plan)))


@dataclass(frozen=True)
class _Boarded:
    """One artifact's writer, and the seats that it has."""

    job: Job
    plan: OutputPlan
    writer: Writer
    rider: Rider | None
    observer: Rider | None
    solver: Solver | None

    @classmethod
    def board(cls, number: int, job: Job, plan: OutputPlan) -> _Boarded:
        """Tensors without statistics ride; the others are observed or solved for.

        Args:
            number: of the folder in the recipe, which tells apart solvers of one label.
            job: the folder.
            plan: one of its artifacts.
        """
        staging = job.staging
        writer = job.plan.backend.open(plan, staging.files, resume=staging.resumed)
        free = [tensor for tensor in plan.tensors if not plan.calibrated.intersection(tensor.sources)]
        rider = Rider.of(plan.label, free, writer, staging) if free else None
        observer = solver = None
        if plan.needs == "moments":
            if not overrides(writer, "observe"):
                raise _defect(plan, "observe")
            observed = [tensor for tensor in plan.tensors if plan.calibrated.intersection(tensor.sources)]
            observer = Rider.of(plan.label, observed, writer, staging)
        elif plan.needs == "hessians":
            if not overrides(writer, "solve"):
                raise _defect(plan, "solve")
            solver = Solver(f"{number} {plan.label}", plan.calibrated, writer, sequential=plan.sequential)
        return cls(job, plan, writer, rider, observer, solver)

    def finish(self, plan: ExportPlan, findings: Mapping[str, Sequence[Finding]]) -> WriteResult:
        """Let the writer make what it makes at the end.

        Raises:
            BackendError: a tensor was never written or never solved for.
        """
        self._check_written()
        mine = findings.get(self.solver.label, ()) if self.solver else ()
        missing = self.plan.calibrated - {finding.name for finding in mine} if self.solver else ()
        if missing:
            raise BackendError(
                sorted(missing)[0],
                found=f"{len(missing)} matrices that were never solved for",
                expected=f"all {len(self.plan.calibrated)} of the plan",
                remedy="Leave them in 16 bits by an override, or report it.",
            )
        made = self.writer.finish(plan.tokens.calibration)
        return WriteResult(self.writer.digests(), made, mine, self._checksums(mine))

    def _checksums(self, findings: Sequence[Finding]) -> dict[str, str]:
        """By the merged tensor's name: of what rode, and of what was solved for."""
        found: dict[str, str] = {}
        for rider in (self.rider, self.observer):
            if rider is not None:
                known = rider.staging.checksums(rider.label)
                found |= {one.checksum_name: known[one.name] for one in rider.plans if one.name in known}
        return found | {one.name: one.checksum for one in findings if one.checksum is not None}

    def _check_written(self) -> None:
        """Every tensor that rides must be in the journal, or zeros would be published in its place."""
        for rider in (self.rider, self.observer):
            if rider is None:
                continue
            stored = {tensor.name for tensor in rider.plans if tensor.nbytes}
            if missing := sorted(stored - rider.staging.done(rider.label)):
                raise BackendError(
                    missing[0],
                    found=f"{len(missing)} tensors of {rider.label} that were never written",
                    expected=f"all {len(stored)} of the plan",
                    remedy="This is a defect of the tour.",
                )


def _defect(plan: OutputPlan, verb: str) -> BackendError:
    return BackendError(
        plan.label, found=f"a writer that cannot {verb}", expected=f"one that can, since the plan needs {plan.needs}",
        remedy="This is a defect of the backend.",
    )  # fmt: skip


def _walk(
    plan: ExportPlan,
    stream: Stream,
    passengers: Passengers,
    stagings: Sequence[Staging],
    device: str,
    reporter: Reporter,
) -> Walk:
    calibration = plan.tokens.calibration
    # All folders must be where the saved states are, or matrices of those that are not would be missed.
    keys = json.dumps([plan.recipe.compute_dtype, *(staging.key for staging in stagings)])
    scratch = stagings[0].scratch
    if not all(staging.resumed for staging in stagings):
        forget_progress(scratch)
    settings = Settings(
        device,
        dtype=DTYPES[plan.recipe.compute_dtype],
        threads=plan.threads,
        keep_bytes=plan.walk.keep_bytes,
        scratch=scratch,
        key=hashlib.sha256(keys.encode()).hexdigest(),
        ahead=device != "cpu",
        on_layer=reporter.layer,
    )
    return Walk(
        plan.model,
        stream,
        passengers,
        evaluation=evaluation_group(plan.tokens.evaluation) if plan.tokens.evaluation else None,
        more=prompt_groups(plan.pack.prompts) if plan.pack else (),
        calibration=Group("calibration", np.array(calibration.ids, dtype=np.int64)) if calibration else None,
        settings=settings,
    )
