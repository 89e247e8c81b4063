"""Scores staged artifacts in their runtimes, and judges them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from exporter.pipeline.job import Job
from exporter.pipeline.publish import stage_pack
from exporter.pipeline.result import Verified
from exporter.plan.export_plan import ExportPlan
from exporter.plan.gate_limits import gate_for
from exporter.plan.reporter import Reporter
from exporter.reference.further_tokens import DrawnTokens
from exporter.runtimes.registry import load_runtime
from exporter.verify.answers.run import Served, WalkedModel, answers_of
from exporter.verify.candidates import Candidate, judge_candidates, read_all_weights
from exporter.verify.gate import with_answers

if TYPE_CHECKING:
    from exporter.pipeline.tour import Toured
    from exporter.reference.predictions import Reference


def verify(plan: ExportPlan, jobs: Sequence[Job], toured: Toured, reporter: Reporter, stack: ExitStack) -> Verified:
    """Judge every artifact of a run by its weights, scores and answers; the verdicts go to the jobs.

    Args:
        plan: the run's plan.
        jobs: its output folders, with their files.
        toured: the trained model's scores, and where they were computed.
        reporter: told about every window, verdict, artifact and layer.
        stack: closes the reference pack's staging folder.

    Raises:
        RuntimeScoreError: a runtime cannot be had or run, for what is no artifact's fault.
    """
    if toured.reference is None:
        return Verified()
    more = _further_tokens(plan, jobs, toured.reference, toured.device, reporter)
    _judge(plan, jobs, toured.reference, more, reporter, toured.device)
    verified = Verified(more.drawn, stage_pack(plan, more.reference(), toured.device, toured.inputs, stack))
    # With it go the states of what was drawn.
    del more
    if plan.recipe.evaluation.answers:
        _answer(plan, jobs, toured.device, reporter)
    return verified


def _further_tokens(
    plan: ExportPlan, jobs: Sequence[Job], reference: Reference, device: str, reporter: Reporter
) -> DrawnTokens:
    return DrawnTokens(
        plan.model,
        plan.recipe.calibration,
        plan.recipe.evaluation,
        reference,
        device,
        reporter,
        cut=plan.recipe.evaluation if plan.tokens.calibration else None,
        threads=plan.threads,
        compute_dtype=plan.recipe.compute_dtype,
        keep=plan.pack is not None,
        scratch=jobs[0].staging.scratch,
    )


def _judge(
    plan: ExportPlan, jobs: Sequence[Job], reference: Reference, more: DrawnTokens, reporter: Reporter, device: str
) -> None:
    """Score every artifact and read its weights back; its verdict goes to its job."""
    candidates = [
        Candidate(
            artifact.label,
            artifact.quant,
            job.entry(artifact),
            load_runtime(job.plan.runtimes[artifact.label], device, plan.execution.endpoint),
            gate_for(artifact.label, artifact.quant, plan.recipe.evaluation.gate, plan.model.parameters),
            job.plan.backend,
            checksums=job.written[artifact.label].checksums,
        )
        for job in jobs
        for artifact in job.plan.artifacts
    ]
    weights = read_all_weights(candidates, plan.model, reporter, plan.threads)
    found = iter(judge_candidates(candidates, weights, reference, more, reporter))
    for job in jobs:
        job.verdicts = {artifact.label: next(found) for artifact in job.plan.artifacts}


def _answer(plan: ExportPlan, jobs: Sequence[Job], device: str, reporter: Reporter) -> None:
    """Ask every artifact that could be scored; its answers, and the faults in those, go to its verdict."""
    served = [
        Served(
            artifact.label,
            job.entry(artifact),
            load_runtime(job.plan.runtimes[artifact.label], device, plan.execution.endpoint),
        )
        if job.verdicts[artifact.label].comparison
        else None
        for job in jobs
        for artifact in job.plan.artifacts
    ]
    trained = WalkedModel(plan.model, device, plan.threads, plan.recipe.compute_dtype)
    answers = iter(answers_of(trained, served, reporter))
    for job in jobs:
        job.verdicts = {label: with_answers(verdict, next(answers)) for label, verdict in job.verdicts.items()}
