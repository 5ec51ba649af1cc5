"""Quantised rows: bounds of the error, agreement with a plain loop, and nothing stored that cannot be read."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import embtab as et
from embtab.errors import UserError
from embtab.quantise import dequantise, quantise, served

rows_of_floats = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-100, 100, width=32),
)


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=rows_of_floats)
def test_the_error_is_at_most_half_a_scale_and_the_rounding_of_the_offset(rows: np.ndarray, bits: int) -> None:
    q, scales, offsets = quantise(torch.from_numpy(rows), bits)
    assert int(q.max()) <= 2**bits - 1
    back = dequantise(q, scales, offsets).numpy()
    # float16 keeps 11 bits: the offset moves by up to 2^-11 of itself, the scale by 2^-11 of itself over all levels.
    slack = np.abs(rows).max(axis=1, keepdims=True) * 2**-11 + 2**-24
    spread = (rows.max(axis=1, keepdims=True) - rows.min(axis=1, keepdims=True)) * 2**-11 + 2**bits * 2**-25
    half = scales.float().numpy()[:, None] / 2
    assert (np.abs(back - rows) <= half * 1.001 + slack + spread).all()


@given(rows=rows_of_floats)
def test_a_loop_in_numpy_agrees(rows: np.ndarray) -> None:
    q, scales, offsets = (t.numpy() for t in quantise(torch.from_numpy(rows), 8))
    for i, row in enumerate(rows):
        offset = np.float16(row.min())
        scale = np.float16(max(np.float32(row.max()) - np.float32(offset), np.float32(0)) / np.float32(255))
        assert (offset, scale) == (offsets[i], scales[i])
        for j, x in enumerate(row):
            exact = 0.0 if scale == 0 else (np.float32(x) - np.float32(offset)) / np.float32(scale)
            assert abs(int(q[i, j]) - min(max(exact, 0), 255)) <= 0.5001


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@given(rows=rows_of_floats)
def test_what_is_served_survives_being_stored_again(rows: np.ndarray, precision: str) -> None:
    once = served(torch.from_numpy(rows), precision)
    twice = served(once, precision)
    assert (twice - once).abs().max() <= 2e-3 * max(float(once.abs().max()), 1e-3)


def test_flat_rows_are_kept() -> None:
    assert torch.equal(served(torch.full((2, 4), 0.5), "int4"), torch.full((2, 4), 0.5))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_cannot_be_stored_is_refused(precision: str, bad: float) -> None:
    with pytest.raises(ValueError, match="not finite or beyond 65504"):
        served(torch.tensor([[0.0, bad]]), precision)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_tables_that_cannot_be_served_are_named(precision: str) -> None:
    plan = et.plan([et.Feature("user", 9), et.Feature("item", 9)], precision=precision)
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    tables.round_to_served()
    tables.lookup.table("item")[3, 1] = 1e6
    with pytest.raises(UserError, match=f"table 'item' cannot be served in {precision}: .* beyond 65504"):
        tables.round_to_served()
