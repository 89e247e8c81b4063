"""Plans with an importance matrix, and the encoder that is given one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.backends.base import overrides
from exporter.backends.gguf.backend import GgufBackend, open_file, plan_file
from exporter.backends.gguf.blocks.ggml import TYPE_NUMBERS, library
from exporter.backends.gguf.encoder import make_encoder
from exporter.backends.gguf.file_types import FILE_TYPES, row_bytes
from exporter.backends.gguf.imatrix.file import Floats, Imatrix, ImatrixError, Importance, imatrix_bytes, read_imatrix
from exporter.backends.gguf.imatrix.plan import GgufPlan, MeasuredImatrix
from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import whole
from exporter.errors import BackendError, RecipeError
from exporter.merge.model import MergedModel
from tests.backends.gguf.direct import write_gguf
from tests.importances import random_importances
from tests.merged import merged_model, metadata_of, tensor_bytes, tensor_types, write_header

WIDE = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 2}
NEEDING = [name for name, file_type in FILE_TYPES.items() if file_type.needs_imatrix]


@pytest.fixture(scope="session")
def wide(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen2", tied=False, **WIDE)


@pytest.fixture(scope="session")
def model(wide: Path) -> MergedModel:
    return merged_model(wide)


@pytest.fixture(scope="session")
def entries() -> dict[str, Importance]:
    return random_importances()


@pytest.fixture
def file(tmp_path: Path, entries: dict[str, Importance]) -> Path:
    """A file of them that says that it was made from a path."""
    path = tmp_path / "given.gguf"
    path.write_bytes(imatrix_bytes(entries, (str(tmp_path / "texts" / "wiki.txt"),), 4, 512))
    return path


def _plan(model: MergedModel, quant: str, imatrix: object) -> GgufPlan:
    plan = GgufBackend().plan(model, quant, {"imatrix": imatrix})
    assert isinstance(plan, GgufPlan)
    return plan


# --- the option ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", NEEDING)
def test_a_type_that_needs_a_matrix_is_refused_without_one(model: MergedModel, quant: str) -> None:
    with pytest.raises(RecipeError, match="--imatrix auto or a file") as caught:
        _plan(model, quant, "none")
    assert quant in caught.value.thing
    assert _plan(model, quant, "auto").quant == quant


@pytest.mark.parametrize(
    ("quant", "verified", "needs"),
    [
        *((quant, verified, "moments") for quant in NEEDING for verified in (True, False)),
        ("Q4_K_M", True, "moments"), ("Q2_K", True, "moments"), ("Q6_K", True, "moments"),
        ("Q4_K_M", False, "nothing"), ("Q8_0", True, "nothing"), ("Q4_0", True, "nothing"), ("BF16", True, "nothing"),
    ],
)  # fmt: skip
def test_where_the_option_is_left_out(model: MergedModel, quant: str, verified: bool, needs: str) -> None:
    plan = GgufBackend().plan(model, quant, {}, verified=verified)
    assert plan.needs == needs
    assert plan == GgufBackend().plan(model, quant, {"imatrix": "auto" if needs == "moments" else "none"})


@pytest.mark.parametrize("option", ["", 3, True, None, ["auto"]])
def test_another_option_is_refused(model: MergedModel, option: object) -> None:
    with pytest.raises(RecipeError, match="auto, none, or a file"):
        _plan(model, "Q4_K_M", option)


def test_none_is_the_plan_without_the_option(model: MergedModel) -> None:
    plan = _plan(model, "Q4_K_M", "none")
    assert plan == GgufBackend().plan(model, "Q4_K_M", {})
    assert plan.imatrix is None
    assert b"quantize.imatrix" not in plan.files[0].header


def test_a_file_that_is_not_there_is_refused(model: MergedModel, tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="No such file"):
        _plan(model, "Q4_K_M", str(tmp_path / "missing.gguf"))


# --- the header ----------------------------------------------------------------------------------------------------


def _imatrix_keys(plan: GgufPlan, folder: Path) -> dict[str, object]:
    found = metadata_of(write_header(plan, folder / "header.gguf"))
    return {key.removeprefix("quantize.imatrix."): value for key, value in found.items() if "imatrix" in key}


def test_the_header_says_which_matrix(model: MergedModel, file: Path, tmp_path: Path) -> None:
    expected = {"file": "model.imatrix.gguf", "dataset": "wiki.txt", "entries_count": 14, "chunks_count": 4}
    assert _imatrix_keys(_plan(model, "Q4_K_M", str(file)), tmp_path) == expected
    measured = plan_file(model, "Q4_K_M", MeasuredImatrix("wiki.txt", chunks=4, chunk_size=512))
    assert _imatrix_keys(measured, tmp_path) == expected
    unknown = _plan(model, "Q4_K_M", "auto")
    assert _imatrix_keys(unknown, tmp_path) == {"file": "model.imatrix.gguf", "entries_count": 14}


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ2_XS"])
def test_a_measured_matrix_gives_the_header_and_layout_of_the_same_one_from_a_file(
    model: MergedModel, file: Path, quant: str
) -> None:
    given = _plan(model, quant, str(file))
    measured = plan_file(model, quant, MeasuredImatrix("wiki.txt", chunks=4, chunk_size=512))
    assert measured.files == given.files
    assert measured.files[0].header == given.files[0].header
    assert measured.tensors == given.tensors
    assert measured.imatrix == given.imatrix
    assert measured.imatrix is not None
    assert measured.imatrix.nbytes == len(given.documents["model.imatrix.gguf"])


def test_no_path_of_the_machine_is_written(model: MergedModel, file: Path, tmp_path: Path) -> None:
    assert str(tmp_path).encode() in file.read_bytes()
    plan = _plan(model, "Q4_K_M", str(file))
    measured = plan_file(model, "Q4_K_M", MeasuredImatrix(r"C:\texts\wiki.txt", 4, 512))
    documents = (plan.documents["model.imatrix.gguf"], measured.files[0].header)
    for data in (plan.files[0].header, *documents):
        assert str(tmp_path).encode() not in data
        assert b"texts" not in data
        assert b"wiki.txt" in data


def test_the_matrix_is_saved_beside_the_file(
    model: MergedModel, file: Path, entries: dict[str, Importance], tmp_path: Path
) -> None:
    plan = _plan(model, "Q4_K_M", str(file))
    assert list(plan.documents) == ["Modelfile", "model.imatrix.gguf"]
    (tmp_path / "saved.gguf").write_bytes(plan.documents["model.imatrix.gguf"])
    saved = read_imatrix(tmp_path / "saved.gguf")
    assert (saved.datasets, saved.chunks, saved.chunk_size) == (("wiki.txt",), 4, 512)
    assert saved.entries.keys() == entries.keys()
    assert all(np.array_equal(saved.entries[name].in_sum2, entries[name].in_sum2) for name in entries)
    # One that is yet to be measured is saved when it is.
    assert _plan(model, "Q4_K_M", "auto").documents.keys() == {"Modelfile"}


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
def test_a_type_that_does_not_depend_on_a_matrix_takes_none(model: MergedModel, file: Path, quant: str) -> None:
    for imatrix in ("auto", str(file)):
        plan = _plan(model, quant, imatrix)
        assert plan.files == _plan(model, quant, "none").files
        assert plan.files[0].header == _plan(model, quant, "none").files[0].header
        assert plan.imatrix is None
        assert plan.documents.keys() == {"Modelfile"}
        assert plan.notes == (f"{quant} does not depend on an importance matrix: none is used",)


# --- entries of another model, or missing --------------------------------------------------------------------------


def _source(entries: dict[str, Importance]) -> Imatrix:
    return Imatrix(entries, (), 1, 512)


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0"])
def test_a_matrix_of_another_model_is_refused(model: MergedModel, entries: dict[str, Importance], quant: str) -> None:
    more = entries | {"blk.2.attn_q.weight": entries["blk.0.attn_q.weight"]}
    with pytest.raises(ImatrixError, match=r"blk\.2\.attn_q\.weight"):
        plan_file(model, quant, _source(more))
    other = entries | {"blk.1.attn_q.weight": entries["blk.0.ffn_down.weight"]}
    with pytest.raises(ImatrixError, match=r"blk\.1\.attn_q\.weight.*512 values.*256"):
        plan_file(model, quant, _source(other))


@pytest.mark.parametrize(("quant", "refused"), [("Q2_K_S", True), ("IQ2_XXS", True), ("IQ3_M", False), ("Q2_K", False)])
def test_a_missing_entry_is_refused_or_noted(
    model: MergedModel, entries: dict[str, Importance], quant: str, refused: bool
) -> None:
    name = "blk.1.ffn_up.weight"
    part = _source({key: entry for key, entry in entries.items() if key != name})
    if refused:
        with pytest.raises(ImatrixError, match=rf"{name}.*requires it"):
            plan_file(model, quant, part)
    else:
        assert plan_file(model, quant, part).notes == (f"1 matrices have no importance, the first of them {name}",)
    assert plan_file(model, quant, _source(entries)).notes == ()


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "IQ4_XS", "Q2_K_S", "IQ3_S"])
def test_the_importance_changes_what_it_covers_and_nothing_else(
    wide: Path, model: MergedModel, entries: dict[str, Importance], tmp_path: Path, quant: str
) -> None:
    ones = {name: Importance(np.ones_like(e.in_sum2), np.ones_like(e.counts)) for name, e in entries.items()}
    weighed = write_gguf(wide, plan_file(model, quant, _source(entries)), tmp_path / "weighed", None)
    evenly = write_gguf(wide, plan_file(model, quant, _source(ones)), tmp_path / "evenly", None)
    assert tensor_types(weighed) == tensor_types(evenly)
    first, second = tensor_bytes(weighed), tensor_bytes(evenly)
    assert {name for name in first if first[name] != second[name]} == entries.keys()


@pytest.mark.parametrize("quant", ["IQ3_XXS", "Q4_K_M"])
def test_a_matrix_that_fills_while_writing_makes_the_bytes_of_a_known_one(
    wide: Path, model: MergedModel, entries: dict[str, Importance], tmp_path: Path, quant: str
) -> None:
    plan = plan_file(model, quant, MeasuredImatrix("wiki.txt", 4, 512))
    known = Imatrix(entries, ("wiki.txt",), 4, 512)

    class Filling(dict[str, Floats]):
        """Has a tensor's importance when it is asked for, as a walk through the layers would."""

        def get(self, name: str, default: object = None) -> Floats | None:  # type: ignore[override]
            return entries[name].mean() if name in entries else None

    measured = write_gguf(wide, plan, tmp_path / "measured", Filling())
    given = write_gguf(wide, plan_file(model, quant, known), tmp_path / "given", None)
    assert measured.read_bytes() == given.read_bytes()
    assert plan.imatrix is not None
    assert plan.imatrix.content(entries) == given.with_name("model.imatrix.gguf").read_bytes()


def test_a_matrix_that_was_measured_only_in_part_is_not_saved(model: MergedModel, tmp_path: Path) -> None:
    plan = _plan(model, "Q4_K_M", "auto")
    writer = GgufBackend().open(plan, tmp_path, resume=False)
    assert overrides(writer, "observe")
    for tensor in plan.tensors:
        if plan.calibrated.intersection(tensor.sources) and tensor.name != "blk.1.ffn_up.weight":
            writer.observe(tensor, tensor.pieces[0], np.ones(tensor.columns), 5)
    with pytest.raises(BackendError, match=r"blk\.1\.ffn_up\.weight: found no second moments"):
        writer.finish(None)
    writer.close()
    assert not (tmp_path / f"{model.name}.imatrix.gguf").exists()


def test_rows_whose_planned_importance_has_not_come_are_not_written(model: MergedModel, tmp_path: Path) -> None:
    plan = _plan(model, "Q4_K_M", "auto")
    writer = open_file(plan, tmp_path, {}, resume=False)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    writer.write(tensors["token_embd.weight"], 0, torch.ones(2, 256))
    with pytest.raises(BackendError, match=r"blk\.0\.attn_q\.weight: found no importance"):
        writer.write(tensors["blk.0.attn_q.weight"], 0, torch.ones(2, 256))
    writer.close()


# --- experts -------------------------------------------------------------------------------------------------------

EXPERTS = TensorPlan("e", whole("e"), (3, 4, 256), "Q4_K", "f", 0, row_bytes("Q4_K", 256))


def _by_ggml(rows: Floats, weights: Floats) -> bytes:
    target = bytearray(len(rows) * EXPERTS.row_bytes)
    import ctypes

    address = (ctypes.c_char * len(target)).from_buffer(target)
    library().ggml_quantize_chunk(
        TYPE_NUMBERS["Q4_K"], rows.ctypes.data, address, 0, len(rows), 256, weights.ctypes.data
    )
    return bytes(target)


@pytest.mark.parametrize("blocks", [[12], [1] * 12, [3, 9], [5, 5, 2], [4, 4, 4]])
def test_every_row_is_weighed_by_its_expert_s_importance(blocks: list[int]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 256)).astype(np.float32)
    weights = rng.exponential(size=(3, 256)).astype(np.float32)
    encode, found, first = make_encoder({"e": weights.ravel()}), b"", 0
    for count in blocks:
        found += encode(EXPERTS, first, torch.from_numpy(rows[first : first + count]))
        first += count
    expected = [_by_ggml(rows[4 * expert : 4 * expert + 4], weights[expert]) for expert in range(3)]
    assert found == b"".join(expected)
    assert found != _by_ggml(rows, weights[0])


def test_experts_need_to_know_which_rows_they_are() -> None:
    encode = make_encoder({"e": np.ones(3 * 256, np.float32)})
    with pytest.raises(TypeError):
        encode(EXPERTS, torch.ones(4, 256))  # type: ignore[arg-type,call-arg]


@pytest.mark.parametrize("size", [256, 2 * 256, 4 * 256])
def test_an_importance_of_another_size_is_not_used(size: int) -> None:
    with pytest.raises(BackendError, match=f"{size} importances"):
        make_encoder({"e": np.ones(size, np.float32)})(EXPERTS, 0, torch.ones(4, 256))
