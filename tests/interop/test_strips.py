"""Pieces of an array are its bytes in order; the next item is made while one is used."""

import threading

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop import strips as module
from dsv3_jax.interop.strips import ahead, strips


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("has_host", [True, False])
def test_pieces_together_are_the_array(monkeypatch, dtype, has_host):
    if not has_host:
        monkeypatch.setattr(module, "_host", lambda: None)
    for limit in ("_SMALL_BYTES", "_STRIP_BYTES", "_PIECE_BYTES"):
        monkeypatch.setattr(module, limit, 64)
    x = np.random.default_rng(0).normal(size=(40, 600)).astype(dtype)
    for array in (x, x.T, x[:, ::2], x[0], x[:0], x[:1].T, x.reshape(40, 2, 300)[:, 1].T, np.zeros((), dtype)):
        pieces = list(strips(array))
        assert b"".join(piece.tobytes() for piece in pieces) == array.tobytes()
        assert all(piece.flags.c_contiguous and piece.dtype == np.uint8 for piece in pieces)
    assert len(list(strips(x.T))) == 3


def test_items_come_in_order_one_ahead_and_errors_come_too():
    made: list[int] = []

    def items():
        for number in range(4):
            made.append(number)
            yield number, threading.current_thread()
        raise OSError("no more")

    got = []

    def take() -> None:
        for number, thread in ahead(items()):
            got.append(number)
            assert thread is not threading.current_thread()
            assert len(made) <= number + 2

    with pytest.raises(OSError, match="no more"):
        take()
    assert got == [0, 1, 2, 3]
