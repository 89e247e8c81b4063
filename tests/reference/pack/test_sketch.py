"""Sketches of weights: what they estimate, by the definition and on artifacts that a reference pack judges.

The sketches' format is ours alone, so no other program reads it. The witnesses are safetensors' loader, peft's merge
and the definition in float64.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.backends.weight_reader import StoredWeight, Tolerance
from exporter.errors import ReferencePackError
from exporter.plan.reference_pack import RUN
from exporter.plan.reporter import Reporter
from exporter.recipe import Calibration
from exporter.reference.pack.sketch import signs, sketch
from exporter.verify.gate import Verification
from exporter.verify.published.verify import verify_with_pack
from exporter.verify.weights.sketch_limits import estimate_checks, estimated_sums
from exporter.verify.weights.sums import Sums
from tests.exports import export_to, pack_to
from tests.folders import copy, edit_tensors, rehash
from tests.peft_merge import merge_with_peft

Make = Callable[..., Path]
# What a type of 4 bits leaves at most.
FOUR_BITS = Tolerance(0.21, 0.43, 0.29, 0.0)


def weight(columns: int, tolerance: Tolerance = FOUR_BITS, group: int = 32) -> StoredWeight:
    return StoredWeight("w", "w", "Q", (16, columns), group, group, tolerance)


def normal(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_signs_stay_what_they_are_in_packs_that_were_written() -> None:
    assert signs(16).tolist() == [1, 1, -1, 1, 1, -1, -1, 1, -1, -1, -1, 1, 1, -1, 1, 1]
    assert hashlib.sha256(signs(4096).astype("<f4").tobytes()).hexdigest()[:16] == "a454ace1dbd82953"
    assert np.array_equal(signs(4096)[:100], signs(100))
    assert abs(signs(1 << 20).mean()) < 4 / 2**10


@pytest.mark.parametrize("columns", [1, 7, RUN, RUN + 1, 3 * RUN, 1000])
def test_a_sketch_by_its_definition(columns: int) -> None:
    values = normal(columns, 5, columns)
    found = sketch(values)
    signed = values.astype(np.float64) * signs(columns)
    wanted = [signed[:, first : first + RUN].sum(axis=1) for first in range(0, columns, RUN)]
    np.testing.assert_allclose(found, np.stack(wanted, axis=1), rtol=1e-4, atol=1e-4)


def test_it_estimates_errors_and_survival() -> None:
    rows, columns = 256, 4 * RUN
    merged, delta = normal(1, rows, columns), 0.2 * normal(2, rows, columns)
    error = 0.1 * normal(3, rows, columns)
    sums = estimated_sums(merged + error - 0.7 * delta, sketch(merged), sketch(delta), weight(columns)).whole()
    runs = rows * 4
    assert sums.elements == runs
    # |E|^2 = 0.1^2 + 0.14^2 of each element; 5 standard errors.
    assert sums.relative_error == pytest.approx(np.hypot(0.1, 0.14), rel=5 * np.sqrt(2 / runs) / 2 + 0.02)
    assert sums.survival is not None
    assert sums.survival_stderr is not None
    assert abs(sums.survival - 0.3) < 5 * sums.survival_stderr
    assert sums.survival_stderr == pytest.approx(np.hypot(0.1, 0.14) / 0.2 / np.sqrt(runs), rel=0.15)


@pytest.mark.parametrize("columns", [32, 64, RUN, 2000])
@pytest.mark.parametrize("rows", [1, 40])
def test_sound_errors_keep_their_limits_in_a_tensor_of_any_size(rows: int, columns: int) -> None:
    """A third of the limit is what rounding leaves; half of it in every tensor is more than any sound one has."""
    for seed in range(400):
        merged = normal(2 * seed, rows, columns)
        stored = merged + 0.5 * FOUR_BITS.error * normal(2 * seed + 1, rows, columns)
        held = list(estimate_checks(weight(columns), estimated_sums(stored, sketch(merged), None, weight(columns))))
        assert all(one.kept for one in held), (seed, held)


def broken(stored: Any, merged: Any, delta: Any = None) -> list[str]:
    one = weight(merged.shape[1])
    sums = estimated_sums(stored, sketch(merged), None if delta is None else sketch(delta), one).whole()
    varied = Sums(different=1, looked_at=1)
    return [held.measure for held in estimate_checks(one, sums.plus(varied)) if not held.kept]


def test_what_it_sees() -> None:
    merged, delta = normal(1, 300, 2 * RUN), 0.3 * normal(2, 300, 2 * RUN)
    sound = merged + 0.07 * normal(3, 300, 2 * RUN)
    assert broken(sound, merged, delta) == []
    assert broken(np.zeros_like(merged), merged) == ["relative_error", "group"]
    assert "survival" in broken(sound - delta, merged, delta)
    assert "survival" in broken(sound + delta, merged, delta)
    assert "relative_error" in broken(sound[::-1].copy(), merged)
    rows = sound.copy()
    rows[10:13] = normal(4, 3, 2 * RUN)
    assert broken(rows, merged) == ["group"]
    # A zero block that should be zero is not off, and one that should not be is, wherever it is.
    assert broken(np.zeros_like(merged), np.zeros_like(merged)) == []
    for huge in (1e30, np.inf):
        wrong = sound.copy()
        wrong[7, 3] = huge
        assert broken(wrong, merged, delta)[:2] == ["relative_error", "group"]
        assert np.isinf(estimated_sums(wrong, sketch(merged), None, weight(2 * RUN)).relative_error)
    nan = sound.copy()
    nan[5, 5] = np.nan
    assert broken(nan, merged, delta) != []


# --- in a pack -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inputs(make_base: Make, make_adapter: Make) -> tuple[Path, Path]:
    base = make_base("qwen3", hidden=256, intermediate=512, head_dim=64)
    return base, make_adapter(base)


@pytest.fixture(scope="session")
def pack(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    scored = {"tokens": 128, "n_ctx": 64, "answers": False}
    text = Calibration(text=Path(__file__)).model_dump()
    return pack_to(tmp_path_factory.mktemp("pack") / "pack", *inputs, calibration=text, evaluation=scored)


def test_a_pack_s_sketches_are_those_of_peft_s_merge(inputs: tuple[Path, Path], pack: Path) -> None:
    """Read by safetensors' own loader, and summed by the definition in float64."""
    base, merged = load_file(inputs[0] / "model.safetensors"), merge_with_peft(inputs[0], inputs[1:])
    stored, updated = load_file(pack / "sketches.safetensors"), 0

    def by_definition(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        rows = values.double().numpy().reshape(-1, values.shape[-1])
        signed = rows * signs(rows.shape[1])
        return np.add.reduceat(signed, range(0, rows.shape[1], RUN), axis=1)

    for name, before in base.items():
        found = stored.pop(f"merged {name}").numpy()
        np.testing.assert_allclose(found, by_definition(merged[name]), rtol=1e-4, atol=1e-4)
        if (delta := stored.pop(f"delta {name}", None)) is not None:
            updated += 1
            change = merged[name].double() - before.double()
            np.testing.assert_allclose(delta.numpy(), by_definition(change), rtol=1e-3, atol=1e-5)
    assert updated > 0
    assert stored.keys() == {"base_values"}


def bare(out: Path, quant: str, *inputs: Path) -> Path:
    """A GGUF file without a manifest, whose hashes would tell that it is another."""
    export_to(out, *inputs, format="gguf", quant=quant, options={"imatrix": "none"}, name="model")
    return Path(shutil.move(out / f"model-{quant}.gguf", out.with_suffix(".gguf")))


def judged(artifact: Path, pack: Path) -> Verification:
    runtime = "llamacpp" if artifact.is_file() else "transformers"
    gate: dict[str, Any] = {"*": 100.0}
    (found,) = verify_with_pack(artifact, pack, gate, runtime, "cpu", Reporter(), answers=False).verdicts.values()
    return found


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q8_0", "Q4_K_M"])
def test_sound_files_pass_and_files_of_the_base_alone_do_not(
    inputs: tuple[Path, Path], pack: Path, tmp_path: Path, quant: str
) -> None:
    found = judged(bare(tmp_path / "sound", quant, *inputs), pack)
    assert found.passed, found.broken
    assert found.weights is not None
    assert found.weights.updated.survival == pytest.approx(1, abs=0.1)
    found = judged(bare(tmp_path / "without", quant, inputs[0]), pack)
    assert not found.passed
    assert found.weights is not None
    assert found.weights.updated.survival == pytest.approx(0, abs=0.1)


def test_one_matrix_of_zeros_in_a_folder(inputs: tuple[Path, Path], pack: Path, tmp_path: Path) -> None:
    export_to(tmp_path / "out", *inputs, quant="bf16", name="model")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "out" / "model.safetensors", lambda tensors: tensors.update({name: 0 * tensors[name]}))
    (tmp_path / "out" / "export.json").unlink()
    found = judged(tmp_path / "out", pack)
    assert [reason.split(" off by its sketch")[0] for reason in found.broken] == [f"{name} is about 100.00%"]


def test_sketches_that_do_not_fit_the_model_are_refused(inputs: tuple[Path, Path], pack: Path, tmp_path: Path) -> None:
    file = bare(tmp_path / "sound", "F32", *inputs)
    changed = copy(pack, tmp_path / "changed")
    edit_tensors(
        changed / "sketches.safetensors",
        lambda tensors: tensors.update({"merged model.norm.weight": torch.zeros(1, 2)}),
    )
    rehash(changed / "reference.json", "sketches.safetensors")
    with pytest.raises(ReferencePackError, match=r"sketches\.safetensors: merged model\.norm\.weight"):
        judged(file, changed)
    changed = copy(pack, tmp_path / "more")
    tensors = json.loads((changed / "model" / "tensors.json").read_text())
    tensors["tensors"]["model.more.weight"] = {"dtype": "F32", "shape": [4, 4]}
    (changed / "model" / "tensors.json").write_text(json.dumps(tensors))
    rehash(changed / "reference.json", "model/tensors.json")
    with pytest.raises(ReferencePackError, match=r"merged model\.more\.weight"):
        judged(file, changed)
    whole = '{"untied": false, "tokenizer": "base", "tensors": {"w": {"dtype": "%s", "shape": [%d]}}}'
    for content in ("[]", whole % ("I9", 1), whole % ("F32", -4)):
        (changed / "model" / "tensors.json").write_text(content)
        rehash(changed / "reference.json", "model/tensors.json")
        with pytest.raises(ReferencePackError, match=r"model/tensors\.json"):
            judged(file, changed)
