"""The gate's limits by size of the model, format and type; docs/measurements has what the defaults rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from exporter.backends.registry import find_backend
from exporter.backends.type_limits import TypeLimits
from exporter.errors import RecipeError
from exporter.recipe import Limits

# By the number of parameters: a small model loses more by the same type.
SizeClass = Literal["below_1b", "from_1b"]
LARGE = 1_000_000_000


@dataclass(frozen=True)
class Gate:
    """Limits that an artifact must keep.

    Attributes:
        max_delta: largest relative change of perplexity, up or down: a model that got better by as much is not the
            model that was trained either.
        min_same_top: smallest share of predictions with the reference's likeliest token.
        max_divergence: largest mean KL divergence from the reference in nats, over the whole vocabulary.
        max_top_k_divergence: the same for the top-k form, which is a lower bound of the other.
        size_class: the class of models that the limits are meant for.
    """

    max_delta: float
    min_same_top: float
    max_divergence: float = math.inf
    max_top_k_divergence: float = math.inf
    size_class: SizeClass = "below_1b"


# The largest share of the full KL divergence that the form over vLLM's 20 likeliest tokens was measured to be, 0.942,
# rounded up; docs/measurements has the others.
TOP_K_SHARE = 0.95


# For formats that say no limits of their own.
_UNKNOWN = TypeLimits(0.10, 0.85, 0.10)


def size_class(parameters: int) -> SizeClass:
    """The class of a model of so many parameters."""
    return "from_1b" if parameters >= LARGE else "below_1b"


def default_gate(limits: TypeLimits, size: SizeClass) -> Gate:
    """The gate of a type without overrides.

    Args:
        limits: what the type's backend says.
        size: the class of the model.
    """
    change, divergence = limits.change, limits.divergence
    if size == "from_1b" and limits.published:
        change, divergence = limits.published
    top_k = round(TOP_K_SHARE * divergence, 6) if limits.top_k else math.inf
    return Gate(change, limits.same_top, divergence, top_k, size)


# For formats of other packages, until they say better by `Backend.limits` or with --gate.
FALLBACK_GATE = default_gate(_UNKNOWN, "below_1b")


def gate_for(label: str, quant: str, overrides: Mapping[str, float | Limits], parameters: int) -> Gate:
    """The gate of an artifact.

    Args:
        label: format and type, such as `myformat q4`.
        quant: the type alone.
        overrides: by type, in any case, or by `*`: a number is the largest change of perplexity, and the only limit
            then; `Limits` replace those that they name. Those of the type come on top of those of `*`.
        parameters: of the merged model.

    Raises:
        BackendError: the format's backend does not load.
    """
    backend = find_backend(label.partition(" ")[0])
    limits = backend.limits.get(quant, _UNKNOWN) if backend else _UNKNOWN
    gate = default_gate(limits, size_class(parameters))
    by_type = {key.lower(): limit for key, limit in overrides.items()}
    for key in ("*", quant.lower()):
        if key in by_type:
            gate = _replaced(gate, by_type[key])
    return gate


def check_types(overrides: Mapping[str, float | Limits], quants: Sequence[str]) -> None:
    """Each limit must be one of a type that is there: one that is silently not applied is no limit.

    Args:
        overrides: as of `gate_for`.
        quants: the types of all artifacts.

    Raises:
        RecipeError: one is not.
    """
    there = {quant.lower() for quant in quants}
    if unknown := [key for key in overrides if key != "*" and key.lower() not in there]:
        raise RecipeError(
            f"evaluation.gate.{unknown[0]}",
            found="a limit of a type that is not made",
            expected="* or one of " + " ".join(dict.fromkeys(quants)),
            remedy="Correct the name of the type.",
        )


def _replaced(gate: Gate, limit: float | Limits) -> Gate:
    if not isinstance(limit, Limits):
        return Gate(limit, 0.0, size_class=gate.size_class)
    names = {
        "change": "max_delta",
        "kl": "max_divergence",
        "top_k_kl": "max_top_k_divergence",
        "same_top": "min_same_top",
    }
    given = {names[key]: value for key, value in limit.model_dump(exclude_none=True).items()}
    return replace(gate, **given)
