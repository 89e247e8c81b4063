"""GPTQModel, through which transformers loads GPTQ folders, kept from disturbing the process that it is imported into.

Facts of gptqmodel 7.6.0 and tokenicer 0.0.14, which it imports: it prints a banner and its log on stdout, makes HF_HOME
a folder under /tmp, and sets PYTORCH_ALLOC_CONF and CUDA_DEVICE_ORDER. peft imports it unasked where it is installed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from exporter.errors import RuntimeUnavailableError
from exporter.libraries.quiet import quietly

# What transformers needs to load a GPTQ folder (transformers/quantizers/quantizer_gptq.py).
PACKAGES = ("optimum", "gptqmodel")
INSTALL = "Run `make gptqmodel` (or `pip install 'exporter[gptqmodel]'`)"
WORKERS = "GPTQMODEL_CPU_WORKERS"
# Multiplies with dequantized weights, in the model's dtype, for any bits and on any device. Left to choose, it takes
# what is fastest, which on some processors rounds the activations too.
KERNEL = "gptq_torch"


def missing_packages() -> tuple[str, ...]:
    """Those of `PACKAGES` that are not installed."""
    return tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def worker_count(threads: int | None = None) -> int:
    """Threads for GPTQModel, by default one a core: with one, which is what it takes on two cores, it fails to load."""
    return max(2, threads or len(os.sched_getaffinity(0)))


def import_quietly() -> None:
    """Import gptqmodel if it is installed, printing nothing and leaving the environment as it was.

    To be called before anything that imports it: peft, and transformers for a GPTQ folder.
    """
    if "gptqmodel" in sys.modules or importlib.util.find_spec("gptqmodel") is None:
        return
    before = dict(os.environ)
    try:
        with quietly(), redirect_stdout(io.StringIO()):
            from logbar import LogBar

            LogBar.shared().setLevel("CRITICAL")
            import gptqmodel  # noqa: F401  (for its effects)
    except ImportError:
        # Whoever needs it will say what is wrong with it.
        pass
    finally:
        os.environ.clear()
        os.environ.update(before)
    # Read when its threads are first needed.
    os.environ.setdefault(WORKERS, str(worker_count()))


def is_gptq(folder: Path) -> bool:
    """Whether a folder's config.json says that its weights are in GPTQ's format."""
    return _quantization(folder).get("quant_method") == "gptq"


def loading_arguments(folder: Path) -> dict[str, Any]:
    """What `from_pretrained` must be told to load a folder: nothing, unless the folder is a GPTQ folder.

    Raises:
        RuntimeUnavailableError: it is, and what that needs is not installed.
    """
    if not is_gptq(folder):
        return {}
    if missing := missing_packages():
        raise RuntimeUnavailableError(
            folder.name,
            found=f"GPTQ weights, and no {' and no '.join(missing)}",
            expected="optimum and gptqmodel, with which transformers loads them",
            remedy=f"{INSTALL}, or score with --runtime vllm.",
        )
    import_quietly()
    from transformers import GPTQConfig

    # Only the kernel is taken from this; the rest is the folder's.
    return {"quantization_config": GPTQConfig(bits=4, backend=KERNEL)}


def _quantization(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return {}
    return config if isinstance(config, dict) else {}
