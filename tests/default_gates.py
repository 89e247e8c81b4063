"""The default gates of every type that a backend has limits for, by label."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.backends.registry import backend_names, load_backend
from exporter.plan.gate_limits import Gate, SizeClass, default_gate


def default_gates(size: SizeClass) -> dict[str, Gate]:
    """Gates without overrides of models of a size.

    Args:
        size: the class of models.
    """
    backends = [load_backend(name) for name in backend_names()]
    return {
        f"{backend.name} {quant}": default_gate(limits, size)
        for backend in backends
        for quant, limits in backend.limits.items()
    }


DEFAULT_GATES: Mapping[str, Gate] = default_gates("below_1b")
LARGE_GATES: Mapping[str, Gate] = default_gates("from_1b")
