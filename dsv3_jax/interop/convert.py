"""The two orders of dimensions of a weight: ours [in .., out ..], the official [out, in]."""

import math

import numpy as np

_PANEL_ROWS = 16
"""Rows transposed at once: a panel's columns fill cache lines, which makes a large matrix up to five times faster."""


def official_shape(shape: tuple[int, ...], input_axes: int) -> tuple[int, ...]:
    """The shape of the official tensor for ours of `shape`, whose first `input_axes` axes are its input.

    q_up [Q, H, I+R] with 1 input axis -> [H·(I+R), Q]; out [H, W, D] with 2 -> [D, H·W]; 0: the same.
    """
    if input_axes == 0:
        return shape
    return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])


def to_official(ours: np.ndarray, input_axes: int) -> np.ndarray:
    """Ours [in .., out ..] -> official [out, in], in its own memory (0 input axes: as it is)."""
    if input_axes == 0:
        return ours
    num_out, num_in = official_shape(ours.shape, input_axes)
    official = np.empty((num_out, num_in), ours.dtype)
    _put_transposed(official, ours.reshape(num_in, num_out))
    return official


def official_view(ours: np.ndarray, input_axes: int) -> np.ndarray:
    """Ours [in .., out ..] seen as the official [out, in]: writing to it fills ours."""
    if input_axes == 0:
        return ours
    num_out, num_in = official_shape(ours.shape, input_axes)
    return ours.reshape(num_in, num_out, copy=False).T


def _put_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """target = source.T"""
    for start in range(0, len(source), _PANEL_ROWS):
        target[:, start : start + _PANEL_ROWS] = source[start : start + _PANEL_ROWS].T
