"""Why an artifact could not be scored: by its own fault, which is a verdict on it, or by the run's, which ends the run.

The run's fault is what the code knows to be so: `RuntimeUnavailableError` (no environment, no package, a server that is
not reachable or was killed, no memory by the runtime's words), an allocation that failed in this process, and a runtime
that was asked for and that the artifact is not made for. A runtime cannot always tell: all else is the artifact's, in
the runtime's words, and so are scores that are no numbers.
"""

from __future__ import annotations

from pathlib import Path

from exporter.errors import RuntimeScoreError, RuntimeUnavailableError
from exporter.plan.resources import out_of_memory


def is_of_the_run(error: RuntimeScoreError) -> bool:
    """Whether an error tells nothing of the artifact: it is the environment's, or memory ran out."""
    return isinstance(error, RuntimeUnavailableError) or out_of_memory(error) is not None


def unscored_reason(error: RuntimeScoreError, what: str, runtime: str, entry: Path) -> str:
    """Why a runtime could not do something with an artifact, in its words, and without what a manifest must not hold.

    Args:
        error: what the runtime raised.
        what: what it could not do: `not scored`, or `no answers`.
        runtime: its name.
        entry: what it was to load; of its path, the name alone is left. An endpoint's address is not said either.
    """
    found, expected = error.found, error.expected
    for path in dict.fromkeys(map(str, (entry.resolve(), entry.absolute(), entry))):
        found, expected = (text.replace(path, entry.name) for text in (found, expected))
    return f"{what} in {runtime}: found {' '.join(found.split())}; expected {expected}"
