"""Commands that serve an artifact from inside its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.runtimes.registry import usable_runtimes


def serving_commands(manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The runtimes that serve an artifact, the preferred one first: name, and the command or Python code.

    A runtime that is not installed here is left out: only its own package knows its commands.

    Args:
        manifest: the folder's `export.json`.
        artifact: one of its `artifacts`.
    """
    runtimes = usable_runtimes(artifact["runtimes"]).values()
    return [command for runtime in runtimes for command in runtime.commands(manifest, artifact)]
