"""Finds runtimes by the entry-point group `exporter.runtimes`, and chooses the one that scores an artifact."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from exporter.errors import RecipeError
from exporter.libraries.entry_points import EntryPointGroup
from exporter.runtimes.artifact_facts import ArtifactFacts, PackedWeights
from exporter.runtimes.base import Runtime

GROUP = EntryPointGroup("exporter.runtimes", "runtime", RecipeError)


@cache
def _entries() -> dict[str, EntryPoint]:
    return GROUP.entries()


def runtime_names() -> tuple[str, ...]:
    """Names of all installed runtimes, sorted."""
    return tuple(_entries())


def find_runtime(name: str) -> type[Runtime]:
    """The class of a runtime. Quick: what it computes with is not imported.

    Raises:
        RecipeError: there is none of that name, or it does not load.
    """
    if name not in _entries():
        raise _unknown(name)
    return GROUP.load(_entries()[name], _checked)


def _checked(found: Any) -> type[Runtime]:
    if not (isinstance(found, type) and issubclass(found, Runtime)):
        raise TypeError("it is no subclass of Runtime")
    return found


def usable_runtimes(names: Sequence[str]) -> dict[str, type[Runtime]]:
    """Those of some runtimes that are installed and load, in the same order. One broken package takes no other down."""
    found = {}
    for name in names:
        try:
            found[name] = find_runtime(name)
        except RecipeError:
            continue
    return found


def runtimes_for(artifact: ArtifactFacts, preferred: Sequence[str]) -> tuple[str, ...]:
    """The runtimes that can score an artifact: those that its backend prefers, then others that say they serve it.

    Args:
        artifact: what is known of it.
        preferred: the runtimes that its backend names, the preferred one first.
    """
    others = usable_runtimes([name for name in runtime_names() if name not in preferred])
    return (*preferred, *(name for name, other in others.items() if other.serves(artifact)))


def choose_runtime(
    names: Sequence[str], *, endpoint: str | None, wanted: str | None = None, packed: Collection[PackedWeights] = ()
) -> str:
    """The runtime that will score an artifact: the one that is wanted, or the first that can be had here.

    Cheap enough for a plan: nothing is loaded or asked.

    Args:
        names: runtimes that serve the artifact, the preferred one first. One that is not installed, or does not load,
            is passed over if another does and it is not wanted.
        endpoint: address of a running server, or None.
        wanted: the runtime that was asked for, or None.
        packed: every kind of packed weights in the artifact: not every runtime that is here takes them.

    Raises:
        RecipeError: the one that is wanted does not serve the artifact, or none can be had here.
    """
    if not names:
        raise RecipeError(
            "artifact", found="no runtime that can score it", expected="one", remedy="Name one with --runtime."
        )
    if wanted is not None and wanted not in names:
        if wanted in _entries():
            # One that does not load could not say that it serves the artifact; its own error tells more.
            find_runtime(wanted)
        raise RecipeError(
            f"--runtime {wanted}",
            found="a runtime that this artifact is not for",
            expected=" or ".join(names),
            remedy="Choose one of them, or leave --runtime out.",
        )
    usable = usable_runtimes(names)
    refusals = []
    for name in (wanted,) if wanted else tuple(usable) or names[:1]:
        refusal = find_runtime(name).lacks(packed, endpoint, [other for other in usable if other != name])
        if refusal is None:
            return name
        refusals.append(refusal)
    raise refusals[0]


def check_endpoint(endpoint: str | None, chosen: Sequence[str]) -> None:
    """An endpoint must be of use to a runtime that scores.

    Args:
        endpoint: address of a running server, or None.
        chosen: the runtimes of all artifacts.

    Raises:
        RecipeError: it is given, and no artifact is scored by a runtime that takes one.
    """
    if endpoint is None or any(find_runtime(name).takes_endpoint for name in chosen):
        return
    taking = [one.title or one.name for one in usable_runtimes(runtime_names()).values() if one.takes_endpoint]
    raise RecipeError(
        f"--endpoint {endpoint}",
        found=f"no artifact that {' or '.join(taking)} scores"
        + (f", only {', '.join(dict.fromkeys(chosen))}" if chosen else ""),
        expected="one that is scored by the server at it",
        remedy="Leave --endpoint out, or see --runtime.",
    )


def load_runtime(name: str, device: str = "cpu", endpoint: str | None = None) -> Runtime:
    """A runtime by name.

    Args:
        name: one of `runtime_names`.
        device: where it computes, if it has a choice.
        endpoint: address of a running server, for a runtime that takes one; None starts one.

    Raises:
        RecipeError: there is none of that name, or the endpoint is not an address.
    """
    return find_runtime(name).open(device, endpoint)


def startup_seconds(names: Sequence[str], endpoint: str | None) -> float:
    """Rough time that runtimes take to start their servers, one after another; at an endpoint one is running.

    Args:
        names: the runtime of each artifact.
        endpoint: address of a running server, or None.
    """
    found = map(find_runtime, names)
    return sum(one.startup_seconds for one in found if endpoint is None or not one.takes_endpoint)


def _unknown(name: str) -> RecipeError:
    names = runtime_names()
    known = " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
    return RecipeError(f"runtime {name!r}", found="unknown", expected=known or "one", remedy="Choose one.")
