"""What changed between encoder and file is told by name, whatever is in the hashes, and nothing else is."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from exporter.backends.gguf.header_reader import read_header
from exporter.backends.gptq import writer
from exporter.backends.gptq.bit_packing import Packed, pack
from exporter.backends.writing import offset_writer as files
from exporter.plan.reporter import Reporter
from exporter.verify.published.files_only import FilesResult, verify_files
from exporter.verify.published.verify import verify_with_pack
from tests.exports import export_to, pack_to
from tests.folders import copy, edit_json, edit_tensors, model_tensors, raw_bytes, rehash
from tests.gptq import unpack_script
from tests.merged import gguf_names, merged_model

TYPES = {"gguf": "Q4_K_M", "safetensors": "bf16", "gptq": "gptq-int4-g32"}
MODULE = "model.layers.1.self_attn.q_proj"
REASON = f"{MODULE}.weight is not stored as it was encoded: its checksum is another than the export's"


@dataclass(frozen=True)
class Published:
    """Exports of one base and adapter.

    Attributes:
        base: the base.
        adapter: the adapter.
        folders: by format.
    """

    base: Path
    adapter: Path
    folders: dict[str, Path]

    def found(self, folder: Path) -> FilesResult:
        """What is found in a folder's files."""
        return verify_files(folder, str(self.base), (str(self.adapter),), Reporter())

    def broken(self, folder: Path) -> list[str]:
        """What is wrong with them."""
        (found,) = self.found(folder).broken.values()
        return list(found)


@pytest.fixture(scope="module")
def published(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Published:
    # Rows of 256: K-quants are what they are called.
    base = make_base("qwen3", hidden=256)
    adapter, parent = make_adapter(base), tmp_path_factory.mktemp("checksums")
    for format_, quant in TYPES.items():
        options = {"imatrix": "none"} if format_ == "gguf" else {}
        export_to(
            parent / format_, base, adapter, format=format_, quant=(quant,), options=options,
            calibration={"tokens": 512, "window": 64},
        )  # fmt: skip
    return Published(base, adapter, {format_: parent / format_ for format_ in TYPES})


def flip_in_gguf(folder: Path) -> str:
    """The lowest bit of the scale of a block."""
    (file,) = folder.glob("*.gguf")
    tensor = read_header(file).tensors["blk.1.attn_q.weight"]
    assert tensor.type == "Q4_K"
    with file.open("r+b") as stream:
        stream.seek(tensor.start + 5 * tensor.row_bytes)
        value = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([value ^ 1]))
    return file.name


def flip_in_packed(folder: Path) -> str:
    """A bit of a scale that bfloat16 has, too."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.scales"].view(torch.int16)[1, 7] ^= 1 << 4

    edit_tensors(folder / "model.safetensors", flip)
    return "model.safetensors"


# Of floats a limit on each element sees every bit.
FLIPS = {"gguf": flip_in_gguf, "gptq": flip_in_packed}


@pytest.mark.parametrize("format_", TYPES)
def test_every_tensor_has_one_and_is_stored_as_it_was_encoded(published: Published, format_: str) -> None:
    folder, model = published.folders[format_], merged_model(published.base, published.adapter)
    (artifact,) = json.loads((folder / "export.json").read_text())["artifacts"]
    assert artifact["checksums"].keys() == {tensor.name for tensor in model.tensors}
    (found,) = published.found(folder).as_json().values()
    assert found["broken"] == []
    assert found["weights"]["checksums"] == {"compared": len(model.tensors), "different": []}


def by_zlib(rows: npt.NDArray[np.uint8]) -> str:
    """By the definition: the CRC-32 of those of the rows."""
    return f"{zlib.crc32(b''.join(zlib.crc32(row.tobytes()).to_bytes(4, 'little') for row in rows)):08x}"


@pytest.mark.parametrize("format_", TYPES)
def test_they_are_zlib_s_of_what_other_readers_find(published: Published, format_: str) -> None:
    """gguf's reader, safetensors' own loader and, of packed matrices, the independent unpacking in numpy."""
    folder, model = published.folders[format_], merged_model(published.base, published.adapter)
    (artifact,) = json.loads((folder / "export.json").read_text())["artifacts"]
    if format_ == "gguf":
        stored = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(folder / artifact["entry"]).tensors}
        found = {source: stored[name] for source, name in gguf_names(model).items()}
    else:
        found = {name: raw_bytes(tensor) for name, tensor in model_tensors(folder).items()}
    if format_ == "gptq":
        packed = {name.replace(".qweight", ".weight") for name in found if name.endswith(".qweight")}
        unpacked = dict(unpack_script().unpacked_tensors(folder))
        found = {name: unpacked[name].tobytes() if name in packed else found[name] for name in unpacked}
    rows = {tensor.name: tensor.source.rows for tensor in model.tensors}
    assert artifact["checksums"] == {
        name: by_zlib(np.frombuffer(data, np.uint8).reshape(rows[name], -1)) for name, data in found.items()
    }


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("gptq-int2-g32", {}),
        ("gptq-int3-gall", {"sym": False}),
        ("gptq-int4-g32", {"sym": False, "checkpoint_format": "gptq_v2"}),
        ("gptq-int4-g64", {"desc_act": True}),
        ("gptq-int8-g64", {}),
    ],
)
def test_packed_weights_stand_for_what_was_solved_for(
    published: Published, tmp_path: Path, quant: str, options: dict[str, object]
) -> None:
    export_to(
        tmp_path / "out", published.base, published.adapter, format="gptq", quant=(quant,),
        options=options | {"force_unservable": True}, calibration={"tokens": 512, "window": 64},
    )  # fmt: skip
    (found,) = published.found(tmp_path / "out").as_json().values()
    assert found["broken"] == []
    assert found["weights"]["checksums"]["compared"] > 0


def test_a_packer_that_spoils_its_codes_is_seen(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, so that whoever looks at them afterwards finds what lies in the file."""

    def spoil(codes: torch.Tensor, *others: Any) -> Packed:
        codes[0, 0] ^= 1
        return pack(codes, *others)

    monkeypatch.setattr(writer, "pack", spoil)
    export_to(
        tmp_path / "out", published.base, published.adapter, format="gptq", quant=(TYPES["gptq"],),
        calibration={"tokens": 512, "window": 64},
    )  # fmt: skip
    (found,) = published.found(tmp_path / "out").as_json().values()
    tensors = merged_model(published.base, published.adapter).tensors
    packed = {tensor.name for tensor in tensors if tensor.name.endswith("_proj.weight")}
    assert set(found["weights"]["checksums"]["different"]) == packed


@pytest.mark.parametrize("format_", ["gguf", "safetensors"])
def test_a_write_that_goes_wrong_is_seen(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    """The hashes are of what lies in the file, and fit."""
    written = files._write_all

    def spoil(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        spoiled = bytearray(data)
        spoiled[-1] ^= 1
        # Headers are written first, at the start.
        written(descriptor, spoiled if offset else data, offset)

    monkeypatch.setattr(files, "_write_all", spoil)
    options = {"imatrix": "none"} if format_ == "gguf" else {}
    export_to(
        tmp_path / "out", published.base, published.adapter, format=format_, quant=(TYPES[format_],), options=options
    )
    (found,) = published.found(tmp_path / "out").as_json().values()
    checksums = found["weights"]["checksums"]
    assert len(checksums["different"]) == checksums["compared"] > 0


@pytest.mark.parametrize("format_", FLIPS)
def test_a_bit_is_named_that_nothing_else_sees(published: Published, tmp_path: Path, format_: str) -> None:
    broken = copy(published.folders[format_], tmp_path / "broken")
    rehash(broken / "export.json", FLIPS[format_](broken))
    assert published.broken(broken) == [REASON]
    artifacts = json.loads((broken / "export.json").read_text())["artifacts"]
    artifacts[0].pop("checksums")
    edit_json(broken / "export.json", artifacts=artifacts)
    assert published.broken(broken) == []


def test_a_pack_tells_it_too(published: Published, tmp_path: Path) -> None:
    pack = pack_to(tmp_path / "pack", published.base, published.adapter, evaluation={"tokens": 256, "n_ctx": 64})
    sound = published.folders["gguf"]
    broken = copy(sound, tmp_path / "broken")
    rehash(broken / "export.json", flip_in_gguf(broken))
    for folder, reasons in ((sound, ()), (broken, (REASON,))):
        (verdict,) = verify_with_pack(
            folder, pack, {"*": 9.0}, None, "cpu", Reporter(), answers=False
        ).verdicts.values()
        assert verdict.broken == reasons
        assert verdict.weights is not None
        assert verdict.weights.checked == len(
            json.loads((folder / "export.json").read_text())["artifacts"][0]["checksums"]
        )
