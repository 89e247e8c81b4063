"""The safetensors backend: folders that transformers opens as they are, with the base's names, order and dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exporter.backends.model_folder.layout import parse_size
from exporter.errors import OutputExistsError, RecipeError, UnknownQuantizationError
from exporter.inputs.checkpoint import INDEX_NAME, Checkpoint
from tests.exports import export_to, refused
from tests.folders import DELETED, copy, edit_json, edit_tensors, model_tensors, raw_bytes, unpack

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(folder: Path) -> Any:
    """Load with transformers; every weight must be in its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_opens_in_transformers(make_base: Make, make_adapter: Make, tmp_path: Path, family: str, tied: bool) -> None:
    base = make_base(family, tied=tied)
    export_to(tmp_path / "out", base, make_adapter(base))
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    written = model_tensors(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
    assert model.config.tie_word_embeddings is tied
    assert model.generation_config.to_dict() == load(base).generation_config.to_dict()


@pytest.mark.parametrize("quant", DTYPES)
def test_stored_dtype_and_configuration(make_base: Make, make_adapter: Make, tmp_path: Path, quant: str) -> None:
    base = make_base("qwen2")
    export_to(tmp_path / "out", base, make_adapter(base), quant=quant)
    assert {tensor.dtype for tensor in model_tensors(tmp_path / "out").values()} == {DTYPES[quant]}
    assert load(tmp_path / "out").dtype == DTYPES[quant]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after.pop("dtype") == str(DTYPES[quant]).removeprefix("torch.")
    before.pop("dtype")
    assert after == before


@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("torch_dtype", "dtype"), ()], ids=" ".join)
def test_dtype_is_brought_up_to_date_under_any_key(make_base: Make, tmp_path: Path, keys: tuple[str, ...]) -> None:
    base = copy(make_base(), tmp_path / "base")
    edit_json(base / "config.json", dtype=DELETED)
    edit_json(base / "config.json", _name_or_path="home/somebody/base", **dict.fromkeys(keys, "bfloat16"))
    export_to(tmp_path / "out", base, quant="fp32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    assert found == dict.fromkeys(keys or ("dtype",), "float32")
    assert "_name_or_path" not in config
    assert load(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_default_is_the_bases_dtype(make_base: Make, tmp_path: Path, dtype: str) -> None:
    export_to(tmp_path / "out", make_base(dtype=dtype))
    assert {str(tensor.dtype) for tensor in model_tensors(tmp_path / "out").values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("shards", ["5GB", "60KB"], ids=["one file", "sharded"])
def test_names_and_order_are_the_bases(make_base: Make, make_adapter: Make, tmp_path: Path, shards: str) -> None:
    base = make_base("qwen2", tied=False, max_shard_size=shards)
    export_to(tmp_path / "out", base, make_adapter(base))
    assert list(Checkpoint.open(tmp_path / "out").tensors) == list(Checkpoint.open(base).tensors)


def test_order_that_nobody_sorted(make_base: Make, tmp_path: Path) -> None:
    base = copy(make_base("qwen3", layers=11), tmp_path / "base")
    header, data = unpack(base / "model.safetensors")
    header.pop("__metadata__", None)
    names = sorted(header, key=lambda name: name[::-1])
    packed, content = {}, b""
    for name in names:
        start, end = header[name]["data_offsets"]
        packed[name] = header[name] | {"data_offsets": [len(content), len(content) + end - start]}
        content += data[start:end]
    raw = json.dumps(packed).encode()
    (base / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + content)
    export_to(tmp_path / "out", base)
    assert list(Checkpoint.open(tmp_path / "out").tensors) == names


def test_file_is_as_the_reference_writes_it(make_base: Make, tmp_path: Path) -> None:
    base = make_base()
    export_to(tmp_path / "out", base)
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    header, _ = unpack(file)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    header.pop("__metadata__")
    assert all(entry["dtype"] == "BF16" for entry in header.values())


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [20_000, "60KB", "100KiB", "0.0001GB"])
def test_shards_and_index(make_base: Make, make_adapter: Make, tmp_path: Path, limit: int | str) -> None:
    base = make_base("qwen3", tied=False)
    adapter = make_adapter(base)
    export_to(tmp_path / "whole", base, adapter)
    out = tmp_path / "out"
    export_to(out, base, adapter, options={"max_shard_size": limit})
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((out / INDEX_NAME).read_text())
    whole, sharded = model_tensors(tmp_path / "whole"), model_tensors(out)
    assert {name: raw_bytes(tensor) for name, tensor in sharded.items()} == {
        name: raw_bytes(tensor) for name, tensor in whole.items()
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files:
        stored = [name for name, shard in index["weight_map"].items() if shard == file.name]
        with safe_open(file, "pt") as opened:
            assert set(opened.keys()) == set(stored)
        assert len(stored) == 1 or sum(whole[name].nbytes for name in stored) <= parse_size(limit)
    assert index["weight_map"].keys() == whole.keys()
    load(out)


def test_sharded_base_becomes_one_file(make_base: Make, tmp_path: Path) -> None:
    base = make_base("qwen3", max_shard_size="60KB")
    export_to(tmp_path / "out", base)
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    load(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), (" 20 MB ", 20 * 10**6), ("7", 7), (7, 7), ("3b", 3)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("size", ["", "GB", "5 TB", "-5GB", "0", "0.0GB", "1e9", "5GB5", "nan", "five"])
def test_size_that_cannot_be_read(size: str) -> None:
    with pytest.raises(RecipeError):
        parse_size(size)


@pytest.mark.parametrize("size", [0, -1, "0", "", True, [1]])
def test_shard_size_that_cannot_be(make_base: Make, tmp_path: Path, size: Any) -> None:
    caught = refused(RecipeError, tmp_path / "out", make_base(), options={"max_shard_size": size})
    assert "max_shard_size" in caught.thing


# --- refusals --------------------------------------------------------------------------------------------------------


def test_unknown_type_lists_what_exists(make_base: Make, tmp_path: Path) -> None:
    caught = refused(UnknownQuantizationError, tmp_path / "out", make_base(), quant="int4")
    assert caught.expected == "one of bf16 fp16 fp32"


def test_unknown_option(make_base: Make, tmp_path: Path) -> None:
    assert "shards" in refused(RecipeError, tmp_path / "out", make_base(), options={"shards": 3}).thing


@pytest.mark.parametrize("quant", [["bf16", "fp16"], ["bf16", "fp32"]], ids=" ".join)
def test_two_types_in_one_folder(make_base: Make, tmp_path: Path, quant: list[str]) -> None:
    base, out = make_base(), tmp_path / "out"
    # In two shards or three the type that is twice as wide: the names of the files differ, the folder is the same.
    options = {"max_shard_size": (base / "model.safetensors").stat().st_size * 2 // 3}
    assert refused(OutputExistsError, out, base, quant=quant, options=options).thing == str(out)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(make_base: Make, tmp_path: Path) -> Path:
    """A bfloat16 base whose norms are float32, with values that bfloat16 does not have."""
    base = copy(make_base(), tmp_path / "mixed")

    def widen(tensors: Tensors) -> None:
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].float() + 1e-5

    edit_tensors(base / "model.safetensors", widen)
    return base


@pytest.mark.parametrize("quant", [None, "bf16"])
def test_mixed_base_keeps_its_wide_tensors(make_base: Make, make_adapter: Make, mixed: Path, tmp_path: Path,
                                           quant: str | None) -> None:  # fmt: skip
    values: dict[str, Any] = {"quant": quant} if quant else {}
    export_to(tmp_path / "out", mixed, make_adapter(make_base()), **values)
    before, after = model_tensors(mixed), model_tensors(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if "norm" in name:
            assert torch.equal(tensor, before[name])
    assert list(Checkpoint.open(tmp_path / "out").tensors) == list(Checkpoint.open(mixed).tensors)
    load(tmp_path / "out")


def test_mixed_base_in_another_type(mixed: Path, tmp_path: Path) -> None:
    result = export_to(tmp_path / "out", mixed, quant="fp16")
    assert {tensor.dtype for tensor in model_tensors(tmp_path / "out").values()} == {torch.float16}
    assert any("wider" in note for note in result.plan.artifacts[0].notes)


# --- the files beside the weights ------------------------------------------------------------------------------------


def test_small_files_are_carried_and_nothing_else(make_base: Make, tmp_path: Path) -> None:
    base = copy(make_base(), tmp_path / "base")
    for name in ("LICENSE", "pytorch_model.bin", "optimizer.pt", "modeling_custom.py"):
        (base / name).write_text(name)
    export_to(tmp_path / "out", base)
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    carried = {"LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert written.keys() == carried | {"config.json", "model.safetensors", "README.md", "export.json", "report.html"}
    for name in carried:
        assert written[name].read_bytes() == (base / name).read_bytes()


OWN_TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"


def carry_tokenizer(base: Path, adapter: Path) -> None:
    """Give an adapter the base's tokenizer with one more token, and no template."""
    definition = json.loads((base / "tokenizer.json").read_text())
    token = definition["added_tokens"][-1]
    definition["added_tokens"].append(token | {"id": token["id"] + 1, "content": "<|own|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(definition))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("template", ["none", "file", "configuration"])
@pytest.mark.parametrize("tokenizer", [False, True], ids=["no tokenizer", "tokenizer"])
def test_tokenizer_and_template_are_the_adapters_where_it_has_its_own(
    make_base: Make, make_adapter: Make, tmp_path: Path, tokenizer: bool, template: str
) -> None:
    from transformers import AutoTokenizer

    base = make_base()
    adapter = copy(make_adapter(base), tmp_path / "adapter")
    if tokenizer:
        carry_tokenizer(base, adapter)
    if template == "file":
        (adapter / "chat_template.jinja").write_text(OWN_TEMPLATE)
    elif template == "configuration":
        if not tokenizer:
            shutil.copy(base / "tokenizer_config.json", adapter)
        edit_json(adapter / "tokenizer_config.json", chat_template=OWN_TEMPLATE)
    export_to(tmp_path / "out", base, adapter)
    loaded, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base))
    assert ("<|own|>" in loaded.get_vocab()) is tokenizer
    assert loaded.chat_template == (original.chat_template if template == "none" else OWN_TEMPLATE)
    assert loaded.eos_token == original.eos_token
    assert loaded("def f(x): return x")["input_ids"] == original("def f(x): return x")["input_ids"]


def test_last_adapter_with_a_tokenizer_wins(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base()
    adapters = [copy(make_adapter(base, seed=seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    for number, adapter in enumerate(adapters[:2]):
        (adapter / "chat_template.jinja").write_text(f"{OWN_TEMPLATE} {number}")
    export_to(tmp_path / "out", base, *adapters)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == f"{OWN_TEMPLATE} 1"


def test_untied_head_comes_last(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base(tied=True)
    export_to(tmp_path / "out", base, make_adapter(base, target_modules=["lm_head"]))
    assert list(Checkpoint.open(tmp_path / "out").tensors) == [*Checkpoint.open(base).tensors, "lm_head.weight"]
    assert load(tmp_path / "out").config.tie_word_embeddings is False
