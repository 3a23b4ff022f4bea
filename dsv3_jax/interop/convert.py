"""The two orders of dimensions of a weight: ours [in .., out ..], the official [out, in]."""

import math

import numpy as np


def official_shape(shape: tuple[int, ...], input_axes: int) -> tuple[int, ...]:
    """The shape of the official tensor for ours of `shape`, whose first `input_axes` axes are its input.

    q_up [Q, H, I+R] with 1 input axis -> [H·(I+R), Q]; out [H, W, D] with 2 -> [D, H·W]; 0: the same.
    """
    if input_axes == 0:
        return shape
    return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])


def to_official(ours: np.ndarray, input_axes: int) -> np.ndarray:
    """Ours [in .., out ..] -> official [out, in]; a view where NumPy can."""
    if input_axes == 0:
        return ours
    num_out, num_in = official_shape(ours.shape, input_axes)
    return ours.reshape(num_in, num_out).T


def from_official(official: np.ndarray, shape: tuple[int, ...], input_axes: int) -> np.ndarray:
    """Inverse of `to_official` for ours of `shape`."""
    if input_axes == 0:
        return official.reshape(shape)
    return official.T.reshape(shape)
