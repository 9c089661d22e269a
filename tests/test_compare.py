"""The comparators must reject what is wrong: a comparator that cannot fail proves nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from compare import as_numpy, assert_close, assert_exact, poisoned, relative_error

torch = pytest.importorskip("torch")


def rows(seed=0, shape=(64, 96)):
    return np.random.default_rng(seed).standard_normal(shape)


def rounded(want, dtype=np.float32):
    return want.astype(dtype)


def change(got, at, value):
    got = got.copy()
    got[at] = value
    return got


WRONG = {
    "nan against number": lambda g: change(g, (3, 5), np.nan),
    "infinity against number": lambda g: change(g, (3, 5), np.inf),
    "all nan": lambda g: np.full_like(g, np.nan),
    "all zero": np.zeros_like,
    "sign flipped everywhere": lambda g: -g,
    "sign flipped in one row": lambda g: change(g, 7, -g[7]),
    "sign of the largest element flipped": lambda g: change(g, (0, abs(g[0]).argmax()), -g[0, abs(g[0]).argmax()]),
    "rows shifted by one": lambda g: np.roll(g, 1, axis=0),
    "columns shifted by one": lambda g: np.roll(g, 1, axis=1),
    "two rows exchanged": lambda g: change(change(g, 3, g[4]), 4, g[3]),
    "two neighbours exchanged": lambda g: change(change(g, (9, 0), g[9, 1]), (9, 1), g[9, 0]),
    "one row of zeros": lambda g: change(g, 63, 0),
    "one row wrong by 1%": lambda g: change(g, 31, g[31] * 1.01),
    "everything wrong by 1%": lambda g: (g * 1.01).astype(g.dtype),
    "a bias missing": lambda g: (g - 0.1).astype(g.dtype),
    "last column stale": lambda g: change(g, (slice(None), -1), 0),
    "wrong shape": lambda g: g[:-1],
    "transposed": lambda g: g.T,
    "broadcastable shape": lambda g: g[:1],
    "extra axis": lambda g: g[None],
    "wrong dtype": lambda g: g.astype(np.float64),
    "half precision": lambda g: g.astype(np.float16),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("with_baseline", [False, True])
def test_assert_close_rejects(wrong, with_baseline):
    want = rows()
    got = rounded(want)
    baseline = rounded(want) if with_baseline else None
    assert_close(got, want, baseline=baseline)
    with pytest.raises(AssertionError):
        assert_close(wrong(got), want, baseline=baseline)


BF16_SEES = sorted(set(WRONG) - {"one row wrong by 1%", "everything wrong by 1%"})


@pytest.mark.parametrize("name", BF16_SEES)
def test_assert_close_rejects_in_bfloat16(name):
    want = rows()
    got = rounded(want, ml_dtypes.bfloat16)
    assert_close(got, want, dtype="bfloat16")
    with pytest.raises(AssertionError):
        assert_close(WRONG[name](got), want, dtype="bfloat16")


def test_a_small_row_among_large_ones_is_seen():
    want = rows()
    want[5] *= 1e-6
    got = rounded(want)
    assert_close(got, want)
    with pytest.raises(AssertionError, match=r"\(5,"):
        assert_close(change(got, 5, got[5] + 1e-8), want)


def test_the_baseline_sets_the_tolerance():
    want = rows()
    noise = 1e-3 * rows(seed=1)
    noise = np.clip(noise, -1e-3, 1e-3)
    baseline = (want + noise).astype(np.float32)
    assert_close((want + 1.9 * noise).astype(np.float32), want, baseline=baseline)
    with pytest.raises(AssertionError):
        assert_close((want + 4 * noise).astype(np.float32), want, baseline=baseline)
    with pytest.raises(AssertionError):
        assert_close((want + noise).astype(np.float32), want)


def test_a_row_that_is_wrong_everywhere_by_little_is_seen():
    # The baseline has one bad element, so every element may be as bad, but not all of a row at once.
    want = rows()
    baseline = change(rounded(want), (0, 0), np.float32(want[0, 0] + 0.01))
    got = change(rounded(want), 9, (want[9] + 0.01).astype(np.float32))
    with pytest.raises(AssertionError, match="RMS"):
        assert_close(got, want, baseline=baseline)


def test_a_poor_baseline_is_not_a_licence_for_nan():
    want = rows()
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(rounded(want), want, baseline=change(rounded(want), (0, 0), np.nan))


def test_nan_and_infinity_agree_with_themselves_only():
    want = rows()
    want[1, 2], want[3, 4] = np.nan, np.inf
    assert_close(rounded(want), want)
    with pytest.raises(AssertionError, match="infinity"):
        assert_close(rounded(change(want, (3, 4), -np.inf)), want)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(rounded(change(want, (1, 2), 0.0)), want)


def test_zero_rows_must_be_zero():
    want = rows()
    want[2] = 0
    assert_close(rounded(want), want)
    with pytest.raises(AssertionError):
        assert_close(change(rounded(want), (2, 0), 1e-20), want)


def test_scale_widens_only_where_asked():
    want = rows() * 1e-4
    got = (want + 3e-8 * rows(seed=2)).astype(np.float32)
    with pytest.raises(AssertionError):
        assert_close(got, want)
    assert_close(got, want, scale=1.0)


def test_empty_and_scalar_shapes():
    assert_close(np.empty((0, 8), np.float32), np.empty((0, 8)))
    assert_close(np.float32(1.5).reshape(1), np.array([1.5]))
    with pytest.raises(AssertionError):
        assert_close(np.float32(1.6).reshape(1), np.array([1.5]))


def test_reference_must_be_float64():
    with pytest.raises(AssertionError, match="reference"):
        assert_close(rounded(rows()), rounded(rows()))


EXACT_WRONG = [
    (np.array([1, 2, 3], np.int32), np.array([1, 2, 4], np.int32)),
    (np.array([1, 2, 3], np.int32), np.array([1, 2, 3], np.int64)),
    (np.array([1, 2, 3], np.int32), np.array([[1, 2, 3]], np.int32)),
    (np.array([0.0]), np.array([-0.0])),
    (np.array([np.nan]), np.array([0.0])),
    (np.array([0.0]), np.array([np.nan])),
    (np.array([1.0]), np.array([np.nextafter(1.0, 2.0)])),
    (np.array([np.inf]), np.array([-np.inf])),
]


@pytest.mark.parametrize(("got", "want"), EXACT_WRONG)
def test_assert_exact_rejects(got, want):
    assert_exact(got, got.copy())
    with pytest.raises(AssertionError):
        assert_exact(got, want)


def test_torch_tensors_are_compared_by_value():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_exact(x, as_numpy(x).astype(np.float32).astype(ml_dtypes.bfloat16))
    assert_close(x, as_numpy(x).astype(np.float64), dtype="bfloat16")
    assert relative_error(x, as_numpy(x).astype(np.float64)).max() == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.int64, np.int16])
@pytest.mark.parametrize("misalign", [0, 1, 3])
def test_poisoned_notices_what_is_left_and_what_is_spoilt(dtype, misalign):
    view, check = poisoned((5, 7), dtype, misalign=misalign)
    assert view.ctypes.data % 64 == misalign * view.dtype.itemsize
    with pytest.raises(AssertionError, match="never written"):
        check()
    view[...] = 1
    check()
    view.reshape(-1).view(np.uint8)[-view.dtype.itemsize :] = 0xA5 if view.dtype.kind == "i" else 0xFF
    with pytest.raises(AssertionError, match="1 of 35"):
        check()


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_poisoned_notices_writes_outside(side, dtype):
    view, check = poisoned((4, 4), dtype)
    view[...] = 1
    check()
    whole = view.base
    while whole.base is not None:
        whole = whole.base
    start = view.ctypes.data - whole.ctypes.data
    whole[start - 1 if side == "before" else start + view.nbytes] ^= 1
    with pytest.raises(AssertionError, match="beside"):
        check()


def test_poisoned_floats_are_nan_and_empty_is_fine():
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        assert np.isnan(poisoned((3,), dtype)[0].astype(np.float64)).all()
    poisoned((0, 4), np.float32)[1]()
