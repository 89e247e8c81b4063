"""Our GGUF files against llama.cpp's own converter and quantizer on the merge that peft computes, and our perplexity
against llama-perplexity's. The tools are the ones of the release inside the installed llama-cpp-python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from exporter.backends.gguf.file_types import BLOCK_SIZES, FILE_TYPES
from exporter.recipe import Calibration, Evaluation
from exporter.runtimes.llamacpp.runtime import LlamaCpp
from exporter.tokens.embedded import embedded_text
from exporter.tokens.windows import make_windows, tokenize
from exporter.verify.scores.metrics import Comparison, compare
from tests.exports import export_to
from tests.folders import copy, edit_json
from tests.merged import (
    dequantized,
    export_gguf,
    gguf_names,
    load_peft,
    merged_model,
    metadata_of,
    tensor_bytes,
    tensor_types,
)
from tests.oracles import tools

pytestmark = pytest.mark.slow

# The types that need no importance matrix; test_imatrix_oracle.py has all of them with one.
PLAIN = tuple(name for name, file_type in FILE_TYPES.items() if not file_type.needs_imatrix)
WIDE = {"hidden": 256, "intermediate": 512, "head_dim": 64, "layers": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-untied": {"family": "qwen2", "tied": False, **WIDE},
    "qwen2-tied": {"family": "qwen2", "tied": True, **WIDE},
    "qwen3-tied": {"family": "qwen3", "tied": True, **WIDE},
    # Rows of 96 are multiples of 32 alone, and rows of 100 of neither: every fallback occurs.
    "qwen3-narrow": {"family": "qwen3", "tied": False, "hidden": 96, "intermediate": 100, "heads": 6, "layers": 2},
}


@dataclass
class Pair:
    """One model in all types from us, and what llama.cpp made of peft's merge of it.

    Attributes:
        ours: folder with our file of every type, `model-TYPE.gguf`.
        theirs: llama.cpp's float32 file.
        largest: largest magnitude that went into each float32 sum, by tensor.
    """

    ours: Path
    theirs: Path
    largest: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def their(self, quant: str) -> Path:
        """llama-quantize's file of a type, made on first use."""
        if quant == "F32":
            return self.theirs
        file = self.theirs.with_name(f"theirs-{quant}.gguf")
        return file if file.is_file() else tools.prepared().quantize(self.theirs, file, quant, threads=2)

    def our(self, quant: str) -> Path:
        """Our file of a type."""
        return self.ours / f"model-{quant}.gguf"

    def differing(self) -> dict[str, npt.NDArray[np.bool_]]:
        """For every tensor, the elements whose two float32 sums differ."""
        ours, theirs = dequantized(self.our("F32")), dequantized(self.theirs)
        return {name: ours[name] != theirs[name] for name in ours}


@pytest.fixture(scope="session")
def pairs(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base = copy(make_base(**MODELS[name]), folder / "base")
            edit_json(base / "generation_config.json", do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
            (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n", encoding="utf-8")
            adapter = make_adapter(base, r=16, lora_alpha=32)
            export_to(folder / "ours", base, adapter, format="gguf", quant=PLAIN, name="model")
            merged = tools.merge_with_peft(base, adapter, folder / "model")
            theirs = tools.convert(merged, folder / "theirs-F32.gguf", name=None)
            made[name] = Pair(folder / "ours", theirs, _magnitudes(base, adapter))
        return made[name]

    return pair


def _magnitudes(base: Path, adapter: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The larger of weight, delta and merged weight, for each element, by GGUF name."""
    names = gguf_names(merged_model(base))
    before, after = load_peft(base).state_dict(), load_peft(base, adapter).merge_and_unload().state_dict()
    return {
        gguf_name: np.maximum(
            np.maximum(np.abs(before[name].numpy()), np.abs(after[name].numpy())),
            np.abs((after[name] - before[name]).numpy()),
        )
        for name, gguf_name in names.items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_f32_differs_in_last_bits_alone(pairs: Callable[[str], Pair], model: str, record_property: Any) -> None:
    pair = pairs(model)
    ours, theirs = dequantized(pair.our("F32")), dequantized(pair.their("F32"))
    assert ours.keys() == theirs.keys()
    differing = elements = 0
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        # One unit in the last place of the largest number in the sum.
        assert (np.abs(ours[name] - theirs[name]) <= np.spacing(pair.largest[name])).all(), name
        differing += int((ours[name] != theirs[name]).sum())
        elements += ours[name].size
    record_property("elements", elements)
    record_property("elements differing in the last bit", differing)
    assert differing < 0.05 * elements


@pytest.mark.parametrize("quant", PLAIN)
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_llama_cpp_s_to_the_byte(
    pairs: Callable[[str], Pair], model: str, quant: str, record_property: Any
) -> None:
    """Bytes may differ only in blocks that hold an element whose two float32 sums differ."""
    pair = pairs(model)
    our, their = pair.our(quant), pair.their(quant)
    assert tensor_types(our) == tensor_types(their)
    ours, theirs, differing = tensor_bytes(our), tensor_bytes(their), pair.differing()
    assert ours.keys() == theirs.keys()
    blocks = unequal = 0
    for name, kind in tensor_types(our).items():
        elements, nbytes = BLOCK_SIZES[kind]
        mine = np.frombuffer(ours[name], np.uint8).reshape(-1, nbytes)
        other = np.frombuffer(theirs[name], np.uint8).reshape(-1, nbytes)
        changed = (mine != other).any(axis=1)
        allowed = differing[name].reshape(-1, elements).any(axis=1)
        assert not (changed & ~allowed).any(), name
        blocks += len(changed)
        unequal += int(changed.sum())
    record_property("blocks", blocks)
    record_property("blocks that differ", unequal)


@pytest.mark.parametrize("quant", PLAIN)
@pytest.mark.parametrize("model", MODELS)
def test_metadata_are_llama_cpp_s(pairs: Callable[[str], Pair], model: str, quant: str) -> None:
    pair = pairs(model)
    ours, theirs = metadata_of(pair.our(quant)), metadata_of(pair.their(quant))
    keys = [
        key
        for key in dict.fromkeys([*ours, *theirs])
        if not any(fnmatchcase(key, pattern) for pattern in tools.DIFFERENT_METADATA)
        or key == "tokenizer.chat_template"
    ]
    assert {key: ours.get(key) for key in keys} == {key: theirs.get(key) for key in keys}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_model_that_the_adapter_unties_is_what_llama_cpp_makes_of_our_checkpoint(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    """peft merges both of a tied pair, so here llama.cpp is given our float32 checkpoint: one merge, no allowance."""
    base = make_base("qwen3", tied=True, **WIDE)
    adapter = make_adapter(base, target_modules=["q_proj", target])
    export_to(tmp_path / "model", base, adapter, quant="fp32", name="model")
    # The converter takes tags from a model card; ours describes this folder, and the other comes from the base.
    (tmp_path / "model" / "README.md").unlink()
    export_to(tmp_path / "ours", base, adapter, format="gguf", quant=PLAIN, name="model")
    pair = Pair(tmp_path / "ours", tools.convert(tmp_path / "model", tmp_path / "theirs-F32.gguf", name=None))
    for quant in PLAIN:
        ours, theirs = pair.our(quant), pair.their(quant)
        assert tensor_types(ours) == tensor_types(theirs)
        assert tensor_bytes(ours) == tensor_bytes(theirs)
        assert metadata_of(ours) == metadata_of(theirs)
    assert "output.weight" in tensor_types(ours)


# --- perplexity ----------------------------------------------------------------------------------------------------


def our_perplexity(file: Path, base: Path, text: Path, n_ctx: int, windows: int) -> Comparison:
    evaluation = Evaluation(tokens=windows * n_ctx, n_ctx=n_ctx)
    found = make_windows(Calibration(text=text), evaluation, merged_model(base).tokenizer)
    assert len(found.ids) == windows
    scores = LlamaCpp().score(file, found, lambda _: None)
    return compare(scores, scores)


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize(("n_ctx", "windows"), [(512, 3), (128, 9), (65, 5)])
def test_perplexity_is_llama_perplexity_s_one_window_at_a_time(
    pairs: Callable[[str], Pair], tmp_path: Path, quant: str, n_ctx: int, windows: int
) -> None:
    """Window by window as we do: equal to all digits but the last or so of those printed."""
    pair = pairs("qwen2-untied")
    text = tmp_path / "text.txt"
    text.write_text(embedded_text()[:12_000], encoding="utf-8")
    theirs, their_error = tools.perplexity(pair.our(quant), text, n_ctx, windows, batch=n_ctx)
    found = our_perplexity(pair.our(quant), pair.ours.parent / "base", text, n_ctx, windows)
    assert found.perplexity == pytest.approx(theirs, rel=3e-6)
    assert found.perplexity_stderr == pytest.approx(their_error, rel=1e-4)


def test_perplexity_of_a_whole_text_drops_the_same_remainder(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("qwen3-tied")
    text = tmp_path / "text.txt"
    text.write_text(embedded_text()[20_000:25_000], encoding="utf-8")
    tokens = len(tokenize(text.read_text(encoding="utf-8"), merged_model(pair.ours.parent / "base").tokenizer))
    assert tokens % 256
    # As many as there are, and not one more: the tool takes what it can get.
    theirs, _ = tools.perplexity(pair.our("Q4_K_M"), text, 256, 10_000, batch=256)
    found = our_perplexity(pair.our("Q4_K_M"), pair.ours.parent / "base", text, 256, tokens // 256)
    assert found.perplexity == pytest.approx(theirs, rel=3e-6)


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K_M"])
def test_perplexity_of_a_trained_model_is_llama_perplexity_s_to_four_digits(
    demo: Path, tmp_path: Path, quant: str
) -> None:
    """With the public tool as anyone would call it: the demo, windows of 512, several of them in a batch."""
    text = tmp_path / "text.txt"
    text.write_text(embedded_text()[:30_000], encoding="utf-8")
    file = export_gguf(demo / "base", tmp_path / "out", quant, adapters=(demo / "adapter",))
    theirs, _ = tools.perplexity(file, text, 512, 8)
    found = our_perplexity(file, demo / "base", text, 512, 8)
    assert f"{found.perplexity:.4g}" == f"{theirs:.4g}" or found.perplexity == pytest.approx(theirs, rel=5e-5)
