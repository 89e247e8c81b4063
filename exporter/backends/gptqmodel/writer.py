"""The writer: the merged folder, GPTQModel's process, and what is kept of what it makes."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.backends.base import FinishedFiles, Writer
from exporter.backends.gptqmodel.plan import GptqModelPlan
from exporter.backends.output_plan import OutputPlan, TensorPlan
from exporter.backends.safetensors.backend import SafetensorsBackend
from exporter.errors import BackendError
from exporter.families.roles import EMBEDDING, module_of
from exporter.inputs.checkpoint import INDEX_NAME
from exporter.libraries import gptqmodel

if TYPE_CHECKING:
    import torch

    from exporter.tokens.windows import CalibrationWindows


WORKER = Path(__file__).with_name("worker.py")
# What of its configuration tells of this machine and not of the weights.
_NOT_KEPT = ("offload_to_disk", "offload_to_disk_path", "dense_vram_strategy_devices", "moe_vram_strategy_devices")


class GptqModelWriter(Writer):
    """Writes the merged folder, then has GPTQModel quantize it.

    Args:
        plan: the artifact's plan.
        folder: where its files go.
        work: where the merged folder goes, and what GPTQModel makes.
        resume: keep what is in the merged folder.
    """

    def __init__(self, plan: GptqModelPlan, folder: Path, work: Path, *, resume: bool) -> None:
        self._plan, self._folder, self._work = plan, folder, work
        self._made = work / "made.json"
        self._device, self._threads = "cpu", gptqmodel.worker_count()
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        self._inner: Writer | None = None
        if not self._made.is_file():
            (work / "merged").mkdir(parents=True, exist_ok=True)
            self._inner = SafetensorsBackend().open(plan.merged, work / "merged", resume=resume)
        self._tensors = {tensor.name: tensor for tensor in self._plan.merged.tensors}

    def place(self, device: str, threads: int) -> None:
        """See `Writer`."""
        self._device, self._threads = device, threads

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None:
        """See `Writer`."""
        if self._inner is not None:
            self._inner.write(self._tensors[tensor.name], first_row, block)

    def sync(self) -> None:
        """See `Writer`."""
        if self._inner is not None:
            self._inner.sync()

    def close(self) -> None:
        """See `Writer`."""
        if self._inner is not None:
            self._inner.close()

    def finish(self, calibration: CalibrationWindows | None) -> FinishedFiles:
        """See `Writer`. What an earlier run finished is not made again.

        Raises:
            BackendError: there is no calibration, GPTQModel fails, or it quantizes other matrices than planned.
        """
        windows = calibration.ids if calibration else ()
        if self._inner is None:
            earlier = json.loads(self._made.read_text("utf-8"))
            return _made(earlier["names"], earlier["rounded"])
        # GPTQModel takes ids beyond the vocabulary without a word.
        rows = next((t.rows for t in self._plan.merged.tensors if t.name == EMBEDDING), math.inf)
        if not windows or max(map(max, windows)) >= rows:
            raise BackendError(
                self._plan.label, found="tokens beyond the vocabulary" if windows else "no calibration tokens",
                expected="windows of token ids", remedy="This is a defect of the caller.",
            )  # fmt: skip
        self._inner.sync()
        self._inner.close()
        merged, target = self._work / "merged", self._work / "target"
        for name, content in self._plan.merged.documents.items():
            (merged / name).write_bytes(content)
        for name, source in self._plan.merged.copies.items():
            shutil.copyfile(source, merged / name)
        shutil.rmtree(target, ignore_errors=True)
        self._run(merged, target, windows)
        _check_packed(target, self._plan)
        (target / "config.json").write_bytes(clean_config(merged / "config.json", target / "config.json"))
        rounded = _rounded(target / "quant_log.csv")
        made = sorted(file.name for file in target.glob("*.safetensors"))
        made += [name for name in (INDEX_NAME, "config.json") if (target / name).is_file()]
        for name in made:
            os.replace(target / name, self._folder / name)
        # From here on, a run that goes on needs no tensor again.
        self._made.write_text(json.dumps({"names": made, "rounded": rounded}))
        shutil.rmtree(merged)
        shutil.rmtree(target)
        return _made(made, rounded)

    def _run(self, merged: Path, target: Path, windows: Sequence[Sequence[int]]) -> None:
        from exporter.libraries.child_process import ServerProcess, last_words

        job = {
            "model": str(merged.absolute()),
            "target": str(target.absolute()),
            "windows": [list(window) for window in windows],
            "max_shard_bytes": self._plan.max_shard_bytes,
            "device": self._device.partition(":")[0],
            "threads": self._threads,
            "quantize": {**self._plan.quantize, "offload_to_disk_path": str((self._work / "offload").absolute())},
        }
        (self._work / "job.json").write_text(json.dumps(job))
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= {
            gptqmodel.WORKERS: os.environ.get(gptqmodel.WORKERS, str(gptqmodel.worker_count(self._threads))),
            **visible_devices(self._device),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str((self._work / "hub").absolute()),
        }
        command = [sys.executable, "-I", str(WORKER), str((self._work / "job.json").absolute())]
        with ServerProcess(command, environment) as process:
            process.wait_until(lambda: False, math.inf)
            status = process.status()
        if status:
            raise BackendError(
                self._plan.label,
                found=f"GPTQModel ended with status {status}: {' / '.join(last_words(process.lines))}",
                expected="a quantized model",
                remedy="Check the model against GPTQModel's words, or choose --format gptq.",
            )
        for name in ("offload", "hub"):
            shutil.rmtree(self._work / name, ignore_errors=True)


def visible_devices(device: str) -> dict[str, str]:
    """What hides all other GPUs from a process: GPTQModel takes every one that it sees, whatever number it is told.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
    """
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    import torch

    # Not the number, which depends on the order that CUDA was told to count in.
    return {"CUDA_VISIBLE_DEVICES": f"GPU-{torch.cuda.get_device_properties(device).uuid}"}


def _made(names: Sequence[str], rounded: Sequence[str]) -> FinishedFiles:
    notes = (f"GPTQModel rounded {len(rounded)} matrices to nearest: {', '.join(rounded)}",) if rounded else ()
    return FinishedFiles(tuple(names), notes)


def clean_config(base: Path, made: Path) -> bytes:
    """The merged model's config.json with GPTQModel's `quantization_config`, without what tells of this machine.

    Args:
        base: config.json of the merged folder.
        made: config.json that GPTQModel wrote.
    """
    config, theirs = (json.loads(file.read_text("utf-8")) for file in (base, made))
    quantization = theirs["quantization_config"]
    meta = {key: value for key, value in quantization.get("meta", {}).items() if key not in _NOT_KEPT}
    config["quantization_config"] = quantization | {"meta": meta}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _rounded(log: Path) -> tuple[str, ...]:
    """Names of the matrices that fell back to rounding, by the log that GPTQModel leaves beside the weights."""
    with log.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if "fallback" in str(row.get("loss"))]
    return tuple(f"layers.{row['layer']}.{row['module']}" for row in rows)


def _check_packed(target: Path, plan: OutputPlan) -> None:
    """Every matrix that was to be packed is, and no other.

    Raises:
        BackendError: one is not, or one more is.
    """
    found: set[str] = set()
    for file in target.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {name.removesuffix(".qweight") for name in header if name.endswith(".qweight")}
    wanted = {module_of(t.name) for t in plan.tensors if t.type.startswith("INT")}
    if difference := sorted(found ^ wanted):
        raise BackendError(
            plan.label,
            found=f"{len(found)} packed matrices; {difference[0]} is "
            + ("packed" if difference[0] in found else "not packed"),
            expected=f"{len(wanted)}",
            remedy="GPTQModel does not know this architecture as we do: choose --format gptq, or report it.",
        )
