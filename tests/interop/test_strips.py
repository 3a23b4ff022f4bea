"""Pieces of an array are its bytes in order; the next item is made while one is used."""

import threading

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop import strips as module
from dsv3_jax.interop.strips import Strips, ahead


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_pieces_together_are_the_array(monkeypatch, dtype):
    for limit, value in {"_STRIP_BYTES": 4096, "_TILE_ROWS": 16, "_TILE_BYTES": 1024, "_PIECE_BYTES": 64}.items():
        monkeypatch.setattr(module, limit, value)
    x = np.random.default_rng(0).normal(size=(40, 600)).astype(dtype)
    strips = Strips()
    for array in (x, x.T, x[:, ::2], x[0, ::2], x[:0], x[:1].T, x.reshape(40, 2, 300)[:, 1].T, np.zeros((), dtype)):
        data = b""
        for piece in ahead(strips.of(array)):
            assert piece.flags.c_contiguous
            assert piece.dtype == np.uint8
            data += piece.tobytes()
        assert data == array.tobytes()


def test_strips_take_turns_in_the_same_memory(monkeypatch):
    monkeypatch.setattr(module, "_TILE_ROWS", 8)
    monkeypatch.setattr(module, "_STRIP_BYTES", 1024)
    strips = Strips()
    places = [piece.ctypes.data for _ in range(2) for piece in strips.of(np.zeros((40, 32), np.float32).T)]
    assert places[::2] == places[:1] * 4
    assert places[1::2] == places[1:2] * 4
    assert places[0] != places[1]


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
