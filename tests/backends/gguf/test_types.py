"""The types of every tensor, against llama.cpp's own `llama_model_quantize`, asked by a dry run what it would do."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from exporter.backends.gguf.ggml import TYPE_NUMBERS
from exporter.backends.gguf.types import BLOCK_SIZES, FILE_TYPES, ModelShape, row_bytes, tensor_type
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
        family = next(family for family in FAMILIES if family.gguf_architecture == self.architecture)
        config = {
            "vocab_size": 2, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.gqa, "num_key_value_heads": 1, "head_dim": self.hidden,
            "intermediate_size": self.inner, "tie_word_embeddings": self.tied,
        }  # fmt: skip
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(architecture, self.layers)
        expected = family.expected_tensors(config)
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


DryRun = Callable[[Path, str], dict[str, str]]


@pytest.fixture
def dry_run() -> Iterator[DryRun]:
    """Ask llama.cpp for the type of every tensor of a file, by name, were it quantized to a file type."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode()))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))

    def run(file: Path, file_type: str) -> dict[str, str]:
        lines.clear()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = FILE_TYPES[file_type].number
        parameters.dry_run = True
        parameters.nthread = 1
        target = str(file.with_suffix(".out"))
        status = llama_cpp.llama_model_quantize(str(file).encode(), target.encode(), ctypes.byref(parameters))
        log = "".join(lines)
        assert status == 0, log
        return {name: (new or old).upper() for name, old, new in REPORT.findall(log)}

    yield run
    from llama_cpp._logger import llama_log_callback

    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def _check(shape: Shape, file: Path, dry_run: DryRun) -> None:
    _write_header_only(file, shape)
    model = ModelShape(
        shape.layers, shape.gqa, shape.tied, bump_attn_v=shape.architecture == "qwen2" and shape.layers == 80
    )
    for name, file_type in FILE_TYPES.items():
        theirs = dry_run(file, name)
        ours = {
            tensor: tensor_type(tensor, dimensions, file_type, model)[0] for tensor, dimensions in shape.tensors.items()
        }
        assert ours == theirs, (shape, name)


@pytest.mark.parametrize("shape", FEW, ids=_label)
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
