"""Second moments against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.backends import hessian
from exporter.backends.hessian import Moments, MomentsError


@settings(max_examples=40, deadline=None)
@given(
    columns=st.integers(1, 40),
    strip=st.sampled_from([1, 7, 16, 64]),
    batches=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0),
    seed=st.integers(0, 1000),
)
def test_mean_of_products(columns: int, strip: int, batches: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, columns, generator=generator) for size in batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian, "STRIP_COLUMNS", strip)
        moments = Moments(columns)
        for rows in inputs:
            moments.add(rows)
        matrix = moments.matrix()
    stacked = torch.cat(inputs).double()
    assert moments.tokens == len(stacked)
    torch.testing.assert_close(matrix.double(), stacked.T @ stacked / len(stacked), rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(moments.diagonal(), matrix.diagonal())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_layouts_and_batch_dimensions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(24, 3, 50).to(dtype).permute(1, 2, 0)  # (3, 50, 24), not contiguous
    moments = Moments(24)
    moments.add(inputs)
    stacked = inputs.reshape(-1, 24).double()
    assert moments.tokens == 150
    torch.testing.assert_close(moments.matrix().double(), stacked.T @ stacked / 150, rtol=1e-5, atol=1e-5)


def test_no_overflow_where_float16_would() -> None:
    moments = Moments(2)
    moments.add(torch.full((4, 2), 60000.0, dtype=torch.float16))
    assert torch.equal(moments.matrix(), torch.full((2, 2), moments.matrix()[0, 0].item()))
    assert moments.matrix()[0, 0].item() == pytest.approx(float(torch.tensor(60000.0).half()) ** 2)


def test_the_matrix_is_a_copy() -> None:
    moments = Moments(3)
    moments.add(torch.eye(3))
    moments.matrix().zero_()
    assert moments.matrix()[0, 0].item() == pytest.approx(1 / 3)


def test_refusals() -> None:
    moments = Moments(8)
    with pytest.raises(MomentsError, match="8 columns"):
        moments.add(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="no tokens"):
        moments.matrix()
    moments.add(torch.zeros(0, 8))
    with pytest.raises(MomentsError, match="no tokens"):
        moments.diagonal()
