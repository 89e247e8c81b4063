"""The types of every tensor, against llama.cpp's own `llama_model_quantize`, asked by a dry run what it would do."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS
from exporter.backends.gguf.file_types import (
    BLOCK_SIZES,
    FILE_TYPES,
    ModelShape,
    has_importance,
    requires_importance,
    row_bytes,
    tensor_type,
)
from exporter.families import FAMILIES

LAYERS = (1, 2, 4, 8, 16, 24, 28, 40, 64, 80)
GROUPS = (1, 2, 4, 7)
# Row widths of the hidden state and of the MLP: multiples of 256; of 32 alone; of neither; and mixtures of them.
WIDTHS = ((256, 512), (96, 160), (256, 96), (96, 256), (100, 260), (256, 100), (100, 256))
# What dry runs print of a tensor: its name, the type it has, and behind an arrow the type it would get.
REPORT = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\w+), size = [^\n]*?(?:-> [^\n(]*\((\w+)\))?\n")


@dataclass(frozen=True)
class Shape:
    """A model whose tensors' types are in question."""

    architecture: str
    layers: int
    gqa: int
    tied: bool
    hidden: int
    inner: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Its tensors by GGUF name: the shapes that the family calls for, one token and one head being enough."""
        family = next(family for family in FAMILIES if family.gguf.architecture == self.architecture)
        config = {
            "vocab_size": 2, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.gqa, "num_key_value_heads": 1, "head_dim": self.hidden,
            "intermediate_size": self.inner, "tie_word_embeddings": self.tied,
        }  # fmt: skip
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(architecture, self.layers)
        expected = {spec.name: spec.shape for spec in family.layout(config)}
        return {names.get_name(name, try_suffixes=(".weight", ".bias")): shape for name, shape in expected.items()}


# Everything with everything where there are few layers; with more of them, widths and tying in turn.
MANY = (
    *(
        Shape(architecture, layers, gqa, tied, *widths)
        for architecture, layers, gqa, tied, widths in product(
            ("qwen2", "qwen3"), (1, 2, 8), GROUPS, (True, False), WIDTHS
        )
    ),
    *(
        Shape(architecture, layers, gqa, index % 3 == 0, *WIDTHS[index % 7])
        for index, (architecture, layers, gqa) in enumerate(
            product(("qwen2", "qwen3"), (4, 16, 24, 28, 40, 64, 80), GROUPS)
        )
    ),
)
# Every number of layers once, the other properties taken in turn; and Qwen2 with 80 layers, which llama.cpp favours.
FEW = (
    Shape("qwen2", 80, 4, True, 256, 512),
    *(
        Shape(("qwen3", "qwen2")[index % 2], layers, GROUPS[index % 4], index % 3 == 0, *WIDTHS[index % 7])
        for index, layers in enumerate(LAYERS[::-1])
    ),
)


def _label(shape: Shape) -> str:
    head = "tied" if shape.tied else "untied"
    return f"{shape.architecture}-{shape.layers}-gqa{shape.gqa}-{head}-{shape.hidden}x{shape.inner}"


def _by_length(shape: Shape) -> Any:
    """A parameter; many layers are many dry runs."""
    return pytest.param(shape, id=_label(shape), marks=[pytest.mark.slow] if shape.layers >= 40 else [])


def _write_header_only(file: Path, shape: Shape) -> None:
    """A float32 GGUF file with all the tensors and, in the place of their data, a hole."""
    writer = gguf.GGUFWriter(file, shape.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.gqa)
    writer.add_head_count_kv(1)
    writer.add_key_length(shape.hidden)
    writer.add_value_length(shape.hidden)
    writer.add_layer_norm_rms_eps(1e-6)
    size = 0
    for name, dimensions in shape.tensors.items():
        nbytes = 4
        for dimension in dimensions:
            nbytes *= dimension
        writer.add_tensor_info(name, dimensions, np.dtype(np.float32), nbytes)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-file.stat().st_size // 32) * 32
    with file.open("r+b") as stream:
        stream.truncate(header + size)


DryRun = Callable[[Path, str, bool], dict[str, str]]
# The line of a dry run without an importance matrix that could not do without.
WILL_REQUIRE = "will require an imatrix"


def _some_imatrix() -> Any:
    """An importance matrix with one entry, of no tensor: whether there is one is all that the types depend on."""
    values = (ctypes.c_float * 1)(1.0)
    entry = llama_cpp.llama_cpp.llama_model_imatrix_data
    return (entry * 2)(entry(b"some", values, 1), entry(None, None, 0))


@pytest.fixture
def dry_run() -> Iterator[DryRun]:
    """Ask llama.cpp for the type of every tensor of a file, by name, were it quantized to a file type."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode()))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))

    def run(file: Path, file_type: str, imatrix: bool) -> dict[str, str]:
        lines.clear()
        entries = _some_imatrix()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = FILE_TYPES[file_type].number
        parameters.dry_run = True
        parameters.nthread = 1
        if imatrix:
            parameters.imatrix = entries
        target = str(file.with_suffix(".out"))
        status = llama_cpp.llama_model_quantize(str(file).encode(), target.encode(), ctypes.byref(parameters))
        log = "".join(lines)
        assert status == 0, log
        assert not imatrix or WILL_REQUIRE not in log
        found = {name: (new or old).upper() for name, old, new in REPORT.findall(log)}
        kind = FILE_TYPES[file_type]
        required = any(requires_importance(name, found[name], kind) for name in found)
        assert imatrix or required == (WILL_REQUIRE in log), (file, file_type)
        return found

    yield run
    from llama_cpp._logger import llama_log_callback

    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def _check(shape: Shape, file: Path, dry_run: DryRun) -> None:
    _write_header_only(file, shape)
    model = ModelShape(
        shape.layers, shape.gqa, shape.tied, bump_attn_v=shape.architecture == "qwen2" and shape.layers == 80
    )
    for (name, file_type), imatrix in product(FILE_TYPES.items(), (False, True)):
        theirs = dry_run(file, name, imatrix)
        ours = {
            tensor: tensor_type(tensor, dimensions, file_type, model, imatrix=imatrix)[0]
            for tensor, dimensions in shape.tensors.items()
        }
        assert ours == theirs, (shape, name, imatrix)


@pytest.mark.parametrize("shape", [_by_length(shape) for shape in FEW])
def test_types_are_those_that_llama_cpp_chooses(shape: Shape, tmp_path: Path, dry_run: DryRun) -> None:
    _check(shape, tmp_path / "model.gguf", dry_run)


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_types_are_those_that_llama_cpp_chooses_for_many_shapes(
    architecture: str, layers: int, tmp_path: Path, dry_run: DryRun
) -> None:
    for shape in MANY:
        if (shape.architecture, shape.layers) == (architecture, layers):
            _check(shape, tmp_path / "model.gguf", dry_run)


def test_the_few_cover_every_property() -> None:
    for name in ("architecture", "layers", "gqa", "tied"):
        assert {getattr(shape, name) for shape in FEW} == {getattr(shape, name) for shape in MANY}, name
    assert {(shape.hidden, shape.inner) for shape in FEW} == set(WIDTHS)


def test_a_fallback_names_the_type_that_was_wanted() -> None:
    model = ModelShape(layers=8, gqa=2, tied=True)
    assert tensor_type("blk.0.attn_q.weight", (8, 96), FILE_TYPES["Q4_K_M"], model) == ("Q5_0", "Q4_K")
    assert tensor_type("blk.0.attn_q.weight", (8, 100), FILE_TYPES["Q4_K_M"], model) == ("F16", "Q4_K")
    assert tensor_type("blk.0.attn_q.weight", (8, 256), FILE_TYPES["Q4_K_M"], model) == ("Q4_K", None)
    assert tensor_type("blk.0.attn_norm.weight", (100,), FILE_TYPES["Q4_K_M"], model) == ("F32", None)


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"])
def test_a_row_that_no_grid_fits_falls_back_to_iq4_nl(name: str) -> None:
    model = ModelShape(layers=8, gqa=2, tied=False)
    kind = FILE_TYPES[name].default
    assert tensor_type("blk.1.ffn_up.weight", (8, 96), FILE_TYPES[name], model, imatrix=True) == ("IQ4_NL", kind)
    assert tensor_type("output.weight", (8, 96), FILE_TYPES[name], model, imatrix=True) == ("Q8_0", None)


def test_an_importance_matrix_changes_types() -> None:
    """As the branches of llama-quant.cpp that ask for it say; the dry runs above hold all of them."""
    model = ModelShape(layers=8, gqa=2, tied=False)
    changed = {
        ("Q4_0", "ffn_down"): ("Q4_0", "Q4_1"),
        ("Q5_0", "ffn_down"): ("Q5_0", "Q5_1"),
        ("IQ4_NL", "ffn_down"): ("Q5_K", "IQ4_NL"),
        ("IQ4_XS", "ffn_down"): ("Q5_K", "IQ4_XS"),
        ("IQ3_XXS", "ffn_down"): ("Q4_K", "IQ3_XXS"),
        ("IQ3_XXS", "attn_v"): ("IQ3_S", "IQ3_XXS"),
    }
    found = {}
    for name, kind in product(
        FILE_TYPES, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ):
        without, with_one = (
            tensor_type(f"blk.0.{kind}.weight", (8, 256), FILE_TYPES[name], model, imatrix=imatrix)[0]
            for imatrix in (False, True)
        )
        if without != with_one:
            found[name, kind] = (without, with_one)
    assert found == changed


def test_file_types_that_need_a_matrix() -> None:
    needing = {name for name, file_type in FILE_TYPES.items() if file_type.needs_imatrix}
    assert needing == {
        "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S",
    }  # fmt: skip


def test_an_importance_is_of_the_layers_matrices() -> None:
    shape = Shape("qwen3", 2, 2, False, 256, 512)
    without = {name for name in shape.tensors if not has_importance(name)}
    assert {name.split(".", 2)[-1] for name in without if name.startswith("blk.")} == {
        "attn_norm.weight", "ffn_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight",
    }  # fmt: skip
    assert {name for name in without if not name.startswith("blk.")} == {
        "token_embd.weight", "output.weight", "output_norm.weight",
    }  # fmt: skip


def test_what_requires_an_importance() -> None:
    assert requires_importance("blk.0.attn_q.weight", "Q2_K", FILE_TYPES["Q2_K_S"])
    assert not requires_importance("blk.0.attn_q.weight", "Q2_K", FILE_TYPES["Q2_K"])
    assert requires_importance("blk.0.attn_q.weight", "IQ2_S", FILE_TYPES["IQ3_XXS"])
    assert not requires_importance("blk.0.attn_q.weight", "IQ3_S", FILE_TYPES["IQ3_S"])
    assert not requires_importance("token_embd.weight", "Q2_K", FILE_TYPES["Q2_K_S"])
    assert not requires_importance("output.weight", "IQ2_XS", FILE_TYPES["IQ2_XS"])


def test_file_types_are_numbered_like_llama_ftype() -> None:
    for name, file_type in FILE_TYPES.items():
        prefix = "ALL_" if name == "F32" else "MOSTLY_"
        assert file_type.number == gguf.LlamaFileType[prefix + name].value, name


@pytest.mark.parametrize("kind", BLOCK_SIZES)
def test_block_sizes_and_numbers_are_ggml_s(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    assert TYPE_NUMBERS[kind] == number.value
    assert BLOCK_SIZES[kind] == gguf.GGML_QUANT_SIZES[number]
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    assert row_bytes(kind, 3 * elements) == 3 * nbytes
