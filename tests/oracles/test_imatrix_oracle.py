"""Quantizing with an importance matrix, against llama-imatrix and llama-quantize of the release inside the installed
llama-cpp-python. The models are bases without adapters, so that both sides start from the same float32 values and
every byte must be equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from exporter.backends.gguf.backend import plan_file
from exporter.backends.gguf.encoder import make_encoder
from exporter.backends.gguf.file_types import FILE_TYPES, FLOAT_TYPES, row_bytes
from exporter.backends.gguf.imatrix.file import Imatrix, ImatrixError, Importance, imatrix_bytes, read_imatrix
from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import whole
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.tokens.embedded import embedded_text
from exporter.tokens.windows import tokenize
from tests.backends.gguf.direct import write_gguf
from tests.exports import export_to
from tests.merged import merged_model, metadata_of, tensor_bytes, tensor_types
from tests.oracles import tools

pytestmark = pytest.mark.slow

QUANTIZED = tuple(name for name, file_type in FILE_TYPES.items() if file_type.default not in FLOAT_TYPES)
# Those that llama-quantize makes without an importance matrix, and we do not: no matrix in them is of a type that
# llama.cpp takes to require one.
LENIENT = ("IQ3_S", "IQ3_M")
# Small, for IQ1_S takes five seconds a million weights; that their types depend on the layer is test_types.py's matter.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-untied": {"family": "qwen2", "tied": False, "hidden": 256, "intermediate": 256, "layers": 2},
    # Four query heads a key-value head, where attn_v is favoured; rows of 512.
    "qwen3-tied": {
        "family": "qwen3", "tied": True, "hidden": 256, "intermediate": 512, "layers": 1, "heads": 8, "head_dim": 32,
    },
    # Rows of 96 fit no grid and rows of 100 no block.
    "qwen3-narrow": {"family": "qwen3", "tied": False, "hidden": 96, "intermediate": 100, "heads": 6, "layers": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A model, and what llama.cpp made of it.

    Attributes:
        base: the checkpoint.
        f32: llama.cpp's float32 file of it.
        text: a text of four windows, with special tokens.
        imatrix: llama-imatrix's file for that text.
    """

    base: Path
    f32: Path
    text: Path
    imatrix: Path

    def plan(self, quant: str, imatrix: Path | None = None) -> Any:
        """Our plan with an importance matrix, llama-imatrix's unless one is given."""
        return plan_file(merged_model(self.base), quant, read_imatrix(imatrix or self.imatrix))

    def their(self, quant: str, out: Path, imatrix: Path | None) -> Path:
        """What llama-quantize makes of the float32 file."""
        return tools.prepared().quantize(self.f32, out, quant, threads=2, imatrix=imatrix)


@pytest.fixture(scope="session")
def made(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    done: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            base = make_base(**MODELS[name])
            f32 = tools.convert(base, folder / "f32.gguf")
            text = folder / "text.txt"
            text.write_text("<|im_start|>user\n" + embedded_text()[:12_000] + "<|im_end|>\n", encoding="utf-8")
            done[name] = Made(base, f32, text, tools.run_llama_imatrix(f32, text, chunks=4))
        return done[name]

    return make


def _assert_same_tensors(ours: Path, theirs: Path) -> None:
    assert tensor_types(ours) == tensor_types(theirs)
    mine, other = tensor_bytes(ours), tensor_bytes(theirs)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []


# --- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_what_llama_imatrix_wrote_is_read_and_written_again_to_the_byte(
    made: Callable[[str], Made], model: str
) -> None:
    one = made(model)
    found = read_imatrix(one.imatrix)
    assert (found.datasets, found.chunks, found.chunk_size) == ((str(one.text),), 4, 512)
    assert {name for name in tensor_types(one.f32) if name in found.entries} == found.entries.keys()
    assert len(found.entries) == 7 * MODELS[model]["layers"]
    assert {float(entry.counts[0]) for entry in found.entries.values()} == {4 * 512.0}
    again = imatrix_bytes(found.entries, found.datasets, found.chunks, found.chunk_size)
    assert again == one.imatrix.read_bytes()


def test_the_old_form_says_the_same(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("qwen2-untied")
    legacy = tools.run_llama_imatrix(one.f32, one.text, chunks=4, legacy=True, out=tmp_path / "old.dat")
    old, new = read_imatrix(legacy), read_imatrix(one.imatrix)
    assert (old.datasets, old.chunks) == (new.datasets, new.chunks)
    assert old.entries.keys() == new.entries.keys()
    for name, entry in old.entries.items():
        assert np.allclose(entry.mean(), new.entries[name].mean(), rtol=1e-6, atol=0), name


def test_special_tokens_are_parsed_unless_asked_otherwise(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("qwen2-untied")
    plain = tools.run_llama_imatrix(one.f32, one.text, chunks=4, parse_special=False, out=tmp_path / "plain.gguf")
    assert not np.array_equal(
        read_imatrix(plain).entries["blk.0.attn_q.weight"].in_sum2,
        read_imatrix(one.imatrix).entries["blk.0.attn_q.weight"].in_sum2,
    )


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTIZED)
@pytest.mark.parametrize("model", MODELS)
def test_a_file_quantized_with_a_matrix_is_llama_quantize_s_to_the_byte(
    made: Callable[[str], Made], tmp_path: Path, model: str, quant: str
) -> None:
    one = made(model)
    plan = one.plan(quant)
    ours = write_gguf(one.base, plan, tmp_path / "ours", None)
    theirs = one.their(quant, tmp_path / "theirs.gguf", one.imatrix)
    _assert_same_tensors(ours, theirs)
    mine, other = metadata_of(ours), metadata_of(theirs)
    # The converter was told another name; test_llamacpp_oracle.py compares names.
    assert mine.pop("general.name") != other.pop("general.name")
    # Paths there, names here.
    file, dataset = other.pop("quantize.imatrix.file"), other.pop("quantize.imatrix.dataset")
    assert file == str(one.imatrix)[:127]
    if plan.imatrix is None:
        # Nothing in the file depends on the matrix, so it says nothing of one.
        assert quant == "Q8_0"
        other = {key: value for key, value in other.items() if not key.startswith("quantize.")}
    else:
        assert mine.pop("quantize.imatrix.file") == "model.imatrix.gguf"
        assert mine.pop("quantize.imatrix.dataset") == Path(dataset).name == "text.txt"
    if plan.imatrix and quant in ("Q4_K_M", "IQ3_M", "IQ1_S"):
        # What we save beside it, read by llama-quantize, makes the same file.
        _assert_same_tensors(ours, one.their(quant, tmp_path / "again.gguf", ours.with_name("model.imatrix.gguf")))
    assert mine == other


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "IQ2_XXS", "IQ3_XXS", "Q6_K"])
def test_a_matrix_in_the_old_form_makes_llama_quantize_s_bytes(
    made: Callable[[str], Made], tmp_path: Path, quant: str
) -> None:
    one = made("qwen2-untied")
    legacy = tools.run_llama_imatrix(one.f32, one.text, chunks=3, legacy=True, out=tmp_path / "old.dat")
    theirs = one.their(quant, tmp_path / "theirs.gguf", legacy)
    ours = write_gguf(one.base, one.plan(quant, legacy), tmp_path / "ours", None)
    _assert_same_tensors(ours, theirs)
    assert metadata_of(ours)["quantize.imatrix.chunks_count"] == metadata_of(theirs)["quantize.imatrix.chunks_count"]
    _assert_same_tensors(ours, one.their(quant, tmp_path / "again.gguf", ours.with_name("model.imatrix.gguf")))


@pytest.mark.parametrize("quant", ["Q5_K_S", "IQ2_S"])
def test_a_matrix_that_covers_the_head_weighs_the_head(made: Callable[[str], Made], tmp_path: Path, quant: str) -> None:
    one = made("qwen2-untied")
    covering = tools.run_llama_imatrix(one.f32, one.text, chunks=3, process_output=True, out=tmp_path / "head.gguf")
    plan = one.plan(quant, covering)
    assert "output.weight" in plan.imatrix.shapes
    ours = write_gguf(one.base, plan, tmp_path / "ours", None)
    _assert_same_tensors(ours, one.their(quant, tmp_path / "theirs.gguf", covering))
    without = write_gguf(one.base, one.plan(quant), tmp_path / "without", None)
    assert tensor_bytes(ours)["output.weight"] != tensor_bytes(without)["output.weight"]


def _random_entries(base: Path, rng: np.random.Generator) -> dict[str, Importance]:
    """Entries with counts that are no whole numbers, sums over many magnitudes, and columns of zeros."""
    entries = {}
    for tensor in plan_file(merged_model(base), "F32", None).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            sums = 10.0 ** rng.uniform(-12, 12, (1, tensor.columns))
            sums[:, rng.random(tensor.columns) < 0.2] = 0
            counts = rng.choice([0.5, 1.49, 2.5, 7.0, 1234.5, 16777217.0], 1)
            entries[tensor.name] = Importance(sums.astype(np.float32), counts.astype(np.float32))
    return entries


@pytest.mark.parametrize(
    "quant", ["Q4_K_M", "Q3_K_S", "Q2_K_S", "Q5_1", "IQ4_XS", "IQ3_XXS", "IQ2_M", "IQ1_M", "IQ1_S"]
)
def test_wild_sums_and_counts_make_llama_quantize_s_bytes(
    made: Callable[[str], Made], tmp_path: Path, quant: str
) -> None:
    one = made("qwen3-tied")
    entries = _random_entries(one.base, np.random.default_rng(5))
    file = tmp_path / "wild.gguf"
    file.write_bytes(imatrix_bytes(entries, (), 0, 512))
    ours = write_gguf(one.base, one.plan(quant, file), tmp_path / "ours", None)
    theirs = one.their(quant, tmp_path / "theirs.gguf", file)
    _assert_same_tensors(ours, theirs)
    keys = [key for key in metadata_of(theirs) if key.startswith("quantize.")]
    assert keys == ["quantize.imatrix.file", "quantize.imatrix.entries_count"]
    assert keys == [key for key in metadata_of(ours) if key.startswith("quantize.")]


def test_values_and_a_matrix_given_while_writing_make_the_same_file(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    """As it will be where the matrix is measured on the way: planned without entries, written with them."""
    from exporter.backends.gguf.imatrix.plan import MeasuredImatrix

    one = made("qwen2-untied")
    known = read_imatrix(one.imatrix)
    plan = plan_file(merged_model(one.base), "IQ2_M", MeasuredImatrix("text.txt", known.chunks, known.chunk_size))
    means = {name: entry.mean() for name, entry in known.entries.items()}
    measured = write_gguf(one.base, plan, tmp_path / "measured", means)
    given = write_gguf(one.base, one.plan("IQ2_M"), tmp_path / "given", None)
    assert measured.read_bytes() == given.read_bytes()
    assert plan.imatrix is not None
    assert plan.imatrix.content(known.entries) == given.with_name("model.imatrix.gguf").read_bytes()


# --- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTIZED)
def test_types_that_need_a_matrix_are_those_that_llama_quantize_refuses(
    made: Callable[[str], Made], tmp_path: Path, quant: str
) -> None:
    one = made("qwen3-tied")
    try:
        one.their(quant, tmp_path / "theirs.gguf", None)
        refused = False
    except tools.oracle_error() as error:
        refused = "this quantization requires an imatrix" in str(error)
    assert (refused or quant in LENIENT) == FILE_TYPES[quant].needs_imatrix


@pytest.mark.parametrize("quant", ["IQ2_XXS", "IQ3_XS", "Q2_K_S", "IQ3_M", "Q4_K_M"])
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.1.attn_output.weight"])
def test_an_entry_that_is_missing_is_missed_where_llama_quantize_misses_it(
    made: Callable[[str], Made], tmp_path: Path, quant: str, name: str
) -> None:
    one = made("qwen2-untied")
    known = read_imatrix(one.imatrix)
    entries = {key: entry for key, entry in known.entries.items() if key != name}
    file = tmp_path / "part.gguf"
    file.write_bytes(imatrix_bytes(entries, known.datasets, known.chunks, known.chunk_size))
    refusal = ""
    try:
        theirs = one.their(quant, tmp_path / "theirs.gguf", file)
    except tools.oracle_error() as error:
        refusal = str(error)
    if refusal:
        assert f"Missing importance matrix for tensor {name}" in refusal
        with pytest.raises(ImatrixError, match=name):
            one.plan(quant, file)
        return
    plan = one.plan(quant, file)
    assert plan.notes == (f"1 matrices have no importance, the first of them {name}",)
    _assert_same_tensors(write_gguf(one.base, plan, tmp_path / "ours", None), theirs)


# --- experts -------------------------------------------------------------------------------------------------------

EXPERTS, EXPERT_ROWS = 4, 24


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 file of one layer of a mixture of experts, random, and an importance matrix in which two experts of
    three tensors have no counts."""
    folder, rng = tmp_path_factory.mktemp("experts"), np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "f32.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_expert_feed_forward_length(256)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_tensor("token_embd.weight", rng.normal(size=(8, 256)).astype(np.float32))
    writer.add_tensor("output.weight", rng.normal(size=(8, 256)).astype(np.float32))
    entries = {}
    for kind in ("gate", "up", "down"):
        name = f"blk.0.ffn_{kind}_exps.weight"
        writer.add_tensor(name, rng.normal(size=(EXPERTS, EXPERT_ROWS, 256)).astype(np.float32))
        sums = rng.exponential(size=(EXPERTS, 256)).astype(np.float32) * 100
        entries[name] = Importance(sums, np.array([0.0, 700.0, 0.4, 3.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "imatrix.gguf").write_bytes(imatrix_bytes(entries, ("text",), 1, 512))
    return folder / "f32.gguf", folder / "imatrix.gguf"


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "IQ3_S", "IQ2_XS", "IQ1_S", "IQ1_M", "Q2_K_S"])
@pytest.mark.parametrize("at_once", [EXPERTS * EXPERT_ROWS, 17])
def test_each_expert_is_weighed_by_its_own_tokens_as_in_llama_quantize(
    experts: tuple[Path, Path], tmp_path: Path, quant: str, at_once: int
) -> None:
    """The encoder alone: blocks of rows that end where they like, experts without tokens among them."""
    f32, imatrix = experts
    theirs = tools.prepared().quantize(f32, tmp_path / "theirs.gguf", quant, threads=2, imatrix=imatrix)
    entries = read_imatrix(imatrix).entries
    encode = make_encoder({name: entry.mean() for name, entry in entries.items()}, entries)
    types, expected = tensor_types(theirs), tensor_bytes(theirs)
    values = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(f32).tensors}
    for name, entry in entries.items():
        assert entry.unseen == 2
        shape = (EXPERTS, EXPERT_ROWS, 256)
        tensor = TensorPlan(name, whole(name), shape, types[name], "f", 0, row_bytes(types[name], 256))
        rows = torch.from_numpy(values[name].reshape(-1, 256))
        found = b"".join(encode(tensor, first, rows[first : first + at_once]) for first in range(0, len(rows), at_once))
        assert found == expected[name], name
        # And not because the importance makes no difference.
        same = make_encoder({})(tensor, 0, rows) if quant not in ("IQ1_S", "IQ2_XS") else b""
        assert same != found


def test_the_entries_of_an_imatrix_survive_llama_imatrix_itself(made: Callable[[str], Made], tmp_path: Path) -> None:
    """llama-imatrix joins files: joined alone, ours must come out as it went in."""
    import subprocess

    one = made("qwen2-untied")
    known = read_imatrix(one.imatrix)
    plan = one.plan("Q4_K_M")
    file = tmp_path / "ours.gguf"
    file.write_bytes(plan.imatrix.content(known.entries))
    joined = tmp_path / "joined.gguf"
    command = [str(tools.prepared().imatrix_tool), "-m", str(one.f32), "--in-file", str(file), "-o", str(joined)]
    subprocess.run(command, check=True, capture_output=True)
    again = read_imatrix(joined)
    assert isinstance(again, Imatrix)
    assert again.entries.keys() == known.entries.keys()
    for name, entry in again.entries.items():
        assert np.array_equal(entry.in_sum2, known.entries[name].in_sum2), name
        assert np.array_equal(entry.counts, known.entries[name].counts), name


# --- measured on the tour -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_the_tour_measures_is_what_llama_imatrix_measures(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """From the same tokens, on base + adapter here and on the merged model there; and llama-quantize, given our file,
    makes our bytes."""
    base = make_base(family, tied=False, hidden=256, intermediate=512, head_dim=64)
    adapter = make_adapter(base)
    text, rest, windows = calibration_text(tmp_path, merged_model(base).tokenizer)
    calibration = {"text": text, "tokens": 256 * windows, "window": 256}
    values: dict[str, Any] = {"format": "gguf", "quant": ("F32", "Q4_K_M"), "options": {"imatrix": "auto"}, "name": "m"}
    export_to(
        tmp_path / "out", base, adapter, calibration=calibration, evaluation={"tokens": 64, "n_ctx": 64}, **values
    )
    f32 = tmp_path / "out" / "m-F32.gguf"
    ours = read_imatrix(tmp_path / "out" / "m.imatrix.gguf")
    theirs = read_imatrix(tools.run_llama_imatrix(f32, rest, chunks=windows, ctx=256))
    assert ours.entries.keys() == theirs.entries.keys()
    assert (ours.chunks, ours.chunk_size, ours.datasets) == (windows, 256, ("text.txt",))
    for name, entry in theirs.entries.items():
        found = ours.entries[name]
        assert np.array_equal(found.counts, entry.counts), name
        one, other = found.in_sum2.ravel().astype(np.float64), entry.in_sum2.ravel().astype(np.float64)
        assert one @ other / np.sqrt((one @ one) * (other @ other)) > 0.9999, name
        assert np.abs(one - other).sum() < 0.01 * other.sum(), name
    made = tools.prepared().quantize(
        f32, tmp_path / "theirs.gguf", "Q4_K_M", threads=2, imatrix=tmp_path / "out" / "m.imatrix.gguf"
    )
    _assert_same_tensors(tmp_path / "out" / "m-Q4_K_M.gguf", made)


def calibration_text(folder: Path, tokenizer: TokenizerFiles) -> tuple[Path, Path, int]:
    """A text; what follows its 64 evaluation tokens, as a text of the same tokens; whole windows in that."""
    whole = embedded_text()[:6000]
    ids = tokenize(whole, tokenizer)
    loaded = Tokenizer.from_file(str(tokenizer.files["tokenizer.json"]))
    for start in range(0, len(whole), 7):
        # A beginning after which 64 tokens end where the text can be cut.
        ids = tokenize(whole[start:], tokenizer)
        rest = loaded.decode(ids[64:], skip_special_tokens=False)
        if tokenize(rest, tokenizer) == ids[64:]:
            (folder / "text.txt").write_text(whole[start:], encoding="utf-8")
            (folder / "rest.txt").write_text(rest, encoding="utf-8")
            return folder / "text.txt", folder / "rest.txt", (len(ids) - 64) // 256
    raise AssertionError("no such beginning")
