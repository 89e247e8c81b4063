"""Qwen3-MoE as GGUF: bytes and metadata of llama.cpp's own converter and quantizer, and the whole flow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.backends.gguf.file_types import FILE_TYPES
from exporter.errors import UnsupportedModelError
from exporter.families.base import Config
from exporter.families.qwen3_moe import QWEN3_MOE
from exporter.plan.reporter import Reporter
from exporter.verify.published.files_only import verify_files
from tests.exports import export_to, refused
from tests.folders import edit_json
from tests.merged import metadata_of, tensor_bytes, tensor_types
from tests.models import make_adapter, make_tokenizer
from tests.oracles import tools

PLAIN = tuple(name for name, file_type in FILE_TYPES.items() if not file_type.needs_imatrix)
WEIGHED = ("Q4_K_M", "Q2_K_S", "IQ3_XS", "IQ3_M", "IQ2_M", "IQ1_S")


def make_base(folder: Path, experts: int = 4, *, layers: int = 2, tied: bool = False, **settings: Any) -> Path:
    """A small Qwen3-MoE with random weights, every layer with experts, as the official ones are."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(experts)
    folder.mkdir(parents=True)
    tokens = make_tokenizer(folder)
    config = Qwen3MoeConfig(
        **{
            "vocab_size": tokens + 16, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 512,
            "tie_word_embeddings": tied, "eos_token_id": tokens - 1, "bos_token_id": None,
        } | settings
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "mlp" in name or "proj" in name:
                parameter.mul_(3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_expert_adapter(base: Path, folder: Path) -> Path:
    """A LoRA on attention by peft, and one on each matrix of every second expert, as trainers that know experts leave
    it: under the ordinary names."""
    make_adapter(base, folder, target_modules=["q_proj", "v_proj"])
    tensors, generator = load_file(folder / "adapter_model.safetensors"), torch.Generator().manual_seed(7)
    for name, weight in load_file(base / "model.safetensors").items():
        if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) % 2 == 0:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            tensors[f"{module}.lora_A.weight"] = 0.05 * torch.randn(4, columns, generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.05 * torch.randn(rows, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    even = r"model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.experts\.\d*[02468]\.(gate|up|down)_proj)"
    edit_json(folder / "adapter_config.json", target_modules=even)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder with our file of every type as `ours`, and llama.cpp's float32 file of the same merge."""
    made: dict[int, Path] = {}

    def pair(experts: int) -> Path:
        if experts not in made:
            folder = made[experts] = tmp_path_factory.mktemp(f"moe{experts}")
            base = make_base(folder / "base", experts, layers=8)
            adapter = make_expert_adapter(base, folder / "adapter")
            # One merge for both: peft would rewrite the adapter for transformers' fused experts.
            export_to(folder / "model", base, adapter, quant="fp32", name="model")
            (folder / "model" / "README.md").unlink()
            tools.convert(folder / "model", folder / "theirs-F32.gguf", name=None)
            export_to(folder / "ours", base, adapter, format="gguf", quant=PLAIN, name="model")
        return made[experts]

    return pair


@pytest.mark.slow
@pytest.mark.parametrize("quant", PLAIN)
@pytest.mark.parametrize("experts", [4, 8])
def test_bytes_and_metadata_are_llama_cpp_s(pairs: Callable[[int], Path], experts: int, quant: str) -> None:
    folder = pairs(experts)
    theirs = folder / f"theirs-{quant}.gguf"
    if quant != "F32":
        tools.prepared().quantize(folder / "theirs-F32.gguf", theirs, quant, threads=2)
    ours = folder / "ours" / f"model-{quant}.gguf"
    assert tensor_types(ours) == tensor_types(theirs)
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert metadata_of(ours) == metadata_of(theirs)
    assert metadata_of(ours)["qwen3moe.expert_count"] == experts


@pytest.mark.slow
@pytest.mark.parametrize("experts", [4, 8])
def test_with_the_importance_matrix_that_was_measured(
    pairs: Callable[[int], Path], tmp_path: Path, experts: int
) -> None:
    """llama-quantize is given the matrix that the tour measured, experts by their own tokens."""
    folder = pairs(experts)
    export_to(
        tmp_path / "ours", folder / "base", folder / "adapter", format="gguf", quant=WEIGHED, name="model",
        options={"imatrix": "auto"}, calibration={"tokens": 2048, "window": 256},
    )  # fmt: skip
    imatrix = tmp_path / "ours" / "model.imatrix.gguf"
    for quant in WEIGHED:
        theirs = tools.prepared().quantize(
            folder / "theirs-F32.gguf", tmp_path / f"theirs-{quant}.gguf", quant, threads=2, imatrix=imatrix
        )
        ours = tmp_path / "ours" / f"model-{quant}.gguf"
        assert tensor_types(ours) == tensor_types(theirs), quant
        assert tensor_bytes(ours) == tensor_bytes(theirs), quant


@pytest.mark.slow
@pytest.mark.parametrize("experts", [4, 8])
def test_weights_read_back_are_those_of_the_merge(pairs: Callable[[int], Path], experts: int) -> None:
    folder = pairs(experts)
    found = verify_files(folder / "ours", str(folder / "base"), (str(folder / "adapter"),), Reporter())
    assert found.passed, found.broken
    for weights in found.weights.values():
        assert weights is not None
        # Of every stored tensor, stacks of experts among them.
        assert weights.checked == len({weight.name for weight, _ in weights.tensors})


@pytest.mark.slow
def test_the_whole_flow_passes_the_gate(tmp_path: Path) -> None:
    """In types that lose little: a random model's likeliest tokens, and its chosen experts, are close to the others."""
    base = make_base(tmp_path / "base")
    adapter = make_expert_adapter(base, tmp_path / "adapter")
    export_to(
        tmp_path / "out", base, adapter, format="gguf", quant=("F32", "BF16"), name="model", verify=True,
        evaluation={"tokens": 2048, "n_ctx": 256}, calibration={"tokens": 1024, "window": 256},
    )  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    for artifact in manifest["artifacts"]:
        assert artifact["verification"]["verdict"] == "passed"
        assert artifact["weights"]["broken"] == []
        names = {tensor["name"] for tensor in artifact["tensors"]}
        assert {"blk.1.ffn_gate_exps.weight", "blk.1.ffn_gate_inp.weight"} <= names
        assert artifact["weights"]["checksums"]["compared"] == len(names)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    base = make_base(tmp_path / "base", **settings)
    error = refused(UnsupportedModelError, tmp_path / "out", base, format="gguf")
    assert error.thing == f"config.json: {key}"


def test_the_table_is_the_model_of_transformers(tmp_path: Path) -> None:
    """Names and shapes of the checkpoint that transformers writes, of a model with one dense layer too."""
    for number, settings in enumerate(({}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"tied": True})):
        base = make_base(tmp_path / str(number), **settings)  # type: ignore[arg-type]
        config: Config = json.loads((base / "config.json").read_text())
        stored = {name: tuple(weight.shape) for name, weight in load_file(base / "model.safetensors").items()}
        assert {spec.name: spec.shape for spec in QWEN3_MOE.layout(config)} == stored
