"""The independent reader of GPTQ folders, by words made by hand and by our packing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from exporter.backends.gptq.bit_packing import CheckpointFormat, pack
from exporter.backends.gptq.bit_unpacking import PARTS, bits_of, unpack_layer, unpack_stream
from exporter.errors import ArtifactError
from tests.folders import model_tensors
from tests.gptq import make_gptq, unpack_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return unpack_script()


def test_words_by_hand() -> None:
    """Codes 0 to 31 of 3 bits are three words; the tenth and the twenty-first cross from one to the next."""
    codes = [(5 * index + 3) % 8 for index in range(32)]
    whole = sum(code << 3 * index for index, code in enumerate(codes))
    words = np.array([[whole >> shift & 0xFFFFFFFF for shift in (0, 32, 64)]], dtype=np.uint32).view(np.int32)
    assert unpack_stream(words, 3).tolist() == [codes]
    assert unpack_stream(np.array([[0x76543210]], dtype=np.int32), 4).tolist() == [list(range(8))]


@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_packing_reads_back(bits: int, written: CheckpointFormat) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 96), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (64, 3), generator=generator, dtype=torch.uint8)
    scales = torch.rand(64, 3, generator=generator).half().float()
    g_idx = torch.arange(96)[torch.randperm(96, generator=generator)] // 32
    packed = pack(codes, scales, zeros, g_idx, bits, written)
    parts = {name: getattr(packed, name).numpy() for name in PARTS}
    expected = (scales[:, g_idx] * (codes.float() - zeros.float()[:, g_idx])).numpy()
    assert bits_of({name: part.shape for name, part in parts.items()}, 0) == bits
    assert np.array_equal(unpack_layer(parts, bits, 32, written), expected)


def test_without_g_idx_groups_are_runs() -> None:
    parts: dict[str, Any] = {
        "qweight": np.full((8, 8), 0x11111111, dtype=np.int32),
        "qzeros": np.zeros((2, 1), dtype=np.int32),
        "scales": np.array([[1.0] * 8, [2.0] * 8], dtype=np.float16),
    }
    weights = unpack_layer(parts, 4, 32, "gptq_v2")
    assert weights.shape == (8, 64)
    assert (weights[:, :32] == 1).all()
    assert (weights[:, 32:] == 2).all()
    with pytest.raises(ArtifactError):
        unpack_layer(parts, 4, 16)


def test_a_zero_point_with_two_meanings_is_refused() -> None:
    parts: dict[str, Any] = {
        "qweight": np.zeros((4, 8), dtype=np.int32),
        "qzeros": np.array([[0x0F000000]], dtype=np.int32),
        "scales": np.ones((1, 8), dtype=np.float16),
    }
    assert unpack_layer(parts, 4, -1, "gptq_v2").min() == -15
    with pytest.raises(ArtifactError, match="overflows"):
        unpack_layer(parts, 4, -1, "gptq")


def test_a_folder_becomes_a_plain_one(script: ModuleType, tmp_path: Path) -> None:
    packed, plain = make_gptq(tmp_path, bits=3, group_size=32)
    assert script.unpack_folder(packed, tmp_path / "unpacked") == 14
    found, expected = model_tensors(tmp_path / "unpacked"), model_tensors(plain)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(script.FormatError, match="no GPTQ folder"):
        script.unpack_folder(plain, tmp_path / "again")
