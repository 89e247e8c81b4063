"""Results of verification as JSON, for the manifest."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from exporter.plan.gate_limits import Gate
from exporter.tokens.windows import Windows
from exporter.verify.gate import Verification
from exporter.verify.scores.metrics import Profile, Spread


def evaluation_json(windows: Windows | None, drawn: Windows | None) -> dict[str, Any] | None:
    """What was scored as JSON, with what was drawn beside; None if nothing was."""
    if windows is None:
        return None
    return {
        "source": windows.source,
        "windows": len(windows.ids),
        "n_ctx": windows.n_ctx,
        "tokens_scored": windows.tokens_scored,
        "sha256": windows.sha256,
        "drawn": {"windows": len(drawn.ids), "tokens_scored": drawn.tokens_scored, "sha256": drawn.sha256}
        if drawn
        else None,
    }


def verification_json(verdict: Verification | None) -> dict[str, Any]:
    """A verdict as JSON; None means that verification was skipped on request."""
    if verdict is None:
        return {"verdict": "skipped"}
    figures = verdict.comparison
    if figures is None:
        return {
            "verdict": verdict.verdict,
            "runtime": verdict.runtime,
            "not_scored": verdict.not_scored,
            "gate": _gate(verdict.gate),
            "broken": list(verdict.broken),
        }
    return {
        "verdict": verdict.verdict,
        "runtime": verdict.runtime,
        "tokens_scored": figures.tokens_scored,
        "looks": list(verdict.looks),
        "perplexity": figures.perplexity,
        "perplexity_stderr": figures.perplexity_stderr,
        "reference_perplexity": figures.reference_perplexity,
        "delta": figures.delta,
        "delta_interval": _ends(figures.delta_interval),
        "delta_log": figures.delta_log,
        "delta_stderr": figures.delta_stderr,
        "delta_log_interval": _ends(figures.delta_log_interval),
        "same_top": figures.same_top,
        "same_top_stderr": figures.same_top_stderr,
        "same_top_interval": _ends(figures.same_top_interval),
        "probability_change": asdict(figures.probability_change),
        "probability_rms": asdict(figures.probability_rms),
        "kl_divergence": _spread(figures.divergence),
        "jensen_shannon": _spread(figures.jensen_shannon),
        "top_k_divergence": _spread(figures.top_k_divergence),
        "profile": _profile(figures.profile),
        "gate": _gate(verdict.gate),
        "checks": [
            {
                "name": check.name,
                "value": check.value,
                "interval": _ends(check.interval),
                "limit": _limit(check.limit),
                "kind": check.kind,
                "verdict": check.verdict,
            }
            for check in verdict.checks
        ],
        **({"not_answered": verdict.not_answered} if verdict.not_answered is not None else {}),
        "broken": list(verdict.broken),
    }


def _gate(gate: Gate) -> dict[str, Any]:
    return {
        "size_class": gate.size_class,
        "max_delta": gate.max_delta,
        "max_divergence": _limit(gate.max_divergence),
        "max_top_k_divergence": _limit(gate.max_top_k_divergence),
        "min_same_top": gate.min_same_top,
    }


def _spread(figures: Spread | None) -> dict[str, Any] | None:
    return None if figures is None else asdict(figures) | {"interval": _ends(figures.interval)}


def _limit(value: float) -> float | None:
    """JSON has no infinity: None is no limit."""
    return value if math.isfinite(value) else None


def _profile(profile: Profile | None) -> dict[str, Any] | None:
    if profile is None:
        return None
    return {key: value and [list(row) for row in value] for key, value in vars(profile).items()}


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
