"""What the tests of GGUF, runtimes and verification share: merged models, planned headers, exports, and readers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from exporter.adapters.adapter import Adapter
from exporter.backends.gguf.backend import GgufBackend
from exporter.backends.output_plan import OutputPlan
from exporter.inputs.checkpoint import Checkpoint
from exporter.merge.model import MergedModel, plan_merge
from exporter.tokens.windows import Windows
from tests.exports import export_to
from tests.folders import edit_tensors


def merged_model(base: Path, *adapters: Path, name: str = "model") -> MergedModel:
    """Base and adapters, checked and listed."""
    return plan_merge(Checkpoint.open(base), tuple(map(Adapter.open, adapters)), name)


def plan_gguf(model: MergedModel, quant: str = "F32") -> OutputPlan:
    """The GGUF backend's plan."""
    return GgufBackend().plan(model, quant, {})


def write_header(plan: OutputPlan, file: Path) -> Path:
    """A file with a plan's header and, in the place of the tensors' data, a hole."""
    file.write_bytes(plan.files[0].header)
    with file.open("r+b") as stream:
        stream.truncate(plan.files[0].nbytes)
    return file


def metadata_of(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key, as plain values, by gguf's own reader."""
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def planned_metadata(model: MergedModel, folder: Path, quant: str = "F32") -> dict[str, Any]:
    """The metadata that a plan would write, read back by gguf's own reader."""
    return metadata_of(write_header(plan_gguf(model, quant), folder / f"{quant}.gguf"))


def drop_tensor(file: Path, name: str) -> None:
    """Take one tensor out of a safetensors file."""
    edit_tensors(file, lambda tensors: tensors.__delitem__(name))


def export_gguf(base: Path, out: Path, quant: str = "F32", *, adapters: tuple[Path, ...] = ()) -> Path:
    """Export one GGUF file, unverified; returns the file."""
    export_to(out, base, *adapters, format="gguf", quant=quant, name="model")
    return out / f"model-{quant}.gguf"


def dequantized(file: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of a GGUF file as float32, by name, by gguf's own dequantizer; outermost dimension first."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in gguf.GGUFReader(file).tensors
    }


def tensor_types(file: Path) -> dict[str, str]:
    """The type of every tensor of a GGUF file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def tensor_bytes(file: Path) -> dict[str, bytes]:
    """The stored bytes of every tensor of a GGUF file."""
    return {tensor.name: np.asarray(tensor.data).tobytes() for tensor in gguf.GGUFReader(file).tensors}


def load_peft(base: Path, *adapters: Path) -> Any:
    """The base in float32 with every adapter active and unmerged, by transformers and peft themselves."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapters:
            model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
            for index, adapter in enumerate(adapters[1:], 1):
                model.load_adapter(str(adapter), adapter_name=str(index))
            model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    return model.eval()


def gguf_names(model: MergedModel) -> dict[str, str]:
    """The GGUF name of every tensor, by its name in the checkpoint, by gguf's own table."""
    architecture = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[model.config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, model.config["num_hidden_layers"])
    return {tensor.name: names.get_name(tensor.name, try_suffixes=(".weight", ".bias")) for tensor in model.tensors}


def random_windows(count: int, n_ctx: int, size: int, seed: int = 0) -> Windows:
    """Windows of random token ids below `size`."""
    ids = np.random.default_rng(seed).integers(0, size, (count, n_ctx))
    return Windows(tuple(tuple(map(int, row)) for row in ids), n_ctx, "random", "0" * 64)


def peft_log_probabilities(model: Any, windows: Windows) -> npt.NDArray[np.float64]:
    """log p of every next token of every window, straight from the model's logits: shape (windows, n_ctx - 1)."""
    ids = torch.tensor(windows.ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    chosen = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    found: npt.NDArray[np.float64] = chosen.numpy()
    return found
