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
from embtab.reader.packed_rows import decoded_rows

rows_of_floats = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-100, 100, width=32),
)


@st.composite
def magnitudes_and_shifts(draw: st.DrawFn) -> np.ndarray:
    """Rows of one magnitude from 1e-7 to 1e4, about a shift of such a magnitude, or about zero."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 17)))
    spread, shift = 10 ** draw(st.floats(-7, 4)), draw(st.sampled_from([0, 1, -1])) * 10 ** draw(st.floats(-7, 4))
    units = draw(npst.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    return (units * spread + shift).astype(np.float32)


def half_below(x: np.ndarray) -> np.ndarray:
    """The largest float16 at or below, found by going down from the nearest."""
    near = x.astype(np.float16)
    return np.where(near.astype(np.float64) > x, np.nextafter(near, np.float16(-np.inf)), near)


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=rows_of_floats | magnitudes_and_shifts())
def test_the_error_is_at_most_half_a_scale_that_is_hardly_more_than_the_range_needs(rows, bits) -> None:
    q, scales, offsets = quantise(torch.from_numpy(rows), bits)
    assert int(q.max()) <= 2**bits - 1
    back = dequantise(q, scales, offsets).double().numpy()
    low, high = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
    step = low - half_below(low).astype(np.float64)  # what rounding the offset down may add to the range
    scale = (high - low + step) / (2**bits - 1)
    scale = np.maximum(scale * (1 + 2**-10), scale + 2**-24)
    float32 = 2**-22 * np.abs(rows).max(1)
    assert (np.abs(back - rows).max(1) <= scale / 2 + float32).all()


@pytest.mark.parametrize(
    ("mean", "std", "most"), [(0, 1e-2, 0.0042), (0, 1e-5, 0.0055), (1, 1e-4, 0.0085), (0, 1e-6, 0.019)]
)
def test_int8_is_better_than_int4_for_small_and_for_shifted_rows(mean: float, std: float, most: float) -> None:
    """The root of the mean square of the error, in units of the rows' standard deviation."""
    drawn = np.random.default_rng(0).normal(mean, std, (5000, 16)).astype(np.float32)
    found = {bits: dequantise(*quantise(torch.from_numpy(drawn), bits)).numpy() - drawn for bits in (8, 4)}
    relative = {bits: float(np.sqrt((error.astype(np.float64) ** 2).mean())) / std for bits, error in found.items()}
    assert relative[8] < most
    assert relative[8] < relative[4] / 3


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=rows_of_floats | magnitudes_and_shifts())
def test_a_loop_in_numpy_agrees(rows: np.ndarray, bits: int) -> None:
    """Of both roundings, row by row, the one whose worst entry is off by less."""
    q, scales, offsets = (t.numpy() for t in quantise(torch.from_numpy(rows), bits))
    levels, one = np.float32(2**bits - 1), np.float32
    for i, row in enumerate(rows):
        low, nearest = half_below(row.min()), row.min().astype(np.float16)
        tries = [
            (-half_below((one(low) - row.max()) / levels), low),
            ((max(row.max() - one(nearest), one(0)) / levels).astype(np.float16), nearest),
        ]
        worst = []
        for scale, offset in tries:
            at = np.clip(np.round((row - one(offset)) / one(scale)), 0, levels) if scale else np.zeros_like(row)
            worst.append(np.abs(at.astype(np.float32) * one(scale) + one(offset) - row).max())
        assert (scales[i], offsets[i]) in tries
        back = q[i].astype(np.float32) * one(scales[i]) + one(offsets[i])
        assert np.abs(back - row).max() <= min(worst) * 1.001 + 1e-30


def test_stored_rows_are_read_as_they_always_were() -> None:
    """The numbers of the format, written down: a bundle's bytes mean this for ever."""
    stored = np.array([[0, 1, 255], [7, 128, 3]], np.uint8)
    scales, offsets = np.array([0.5, 2**-24], np.float16), np.array([-3, 1.25], np.float16)
    wanted = [[-3, -2.5, 124.5], [1.25 + 7 * 2**-24, 1.25 + 128 * 2**-24, 1.25 + 3 * 2**-24]]
    np.testing.assert_array_equal(decoded_rows(stored, 3, scales, offsets), np.array(wanted, np.float32))
    torch.testing.assert_close(
        dequantise(*map(torch.from_numpy, (stored, scales, offsets))), torch.tensor(wanted), rtol=0, atol=0
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
@given(rows=rows_of_floats | magnitudes_and_shifts())
def test_rows_of_a_grid_stay_on_it(rows: np.ndarray, precision: str) -> None:
    """Rounding again, as testing and exporting do, moves nothing further than float32 itself."""
    once = served(torch.from_numpy(rows), precision)
    torch.testing.assert_close(served(once, precision), once, rtol=2**-9, atol=2**-22)


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
