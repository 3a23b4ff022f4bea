"""Cases that go wrong in every way, for `python -m dsv3_kernels.check --cases tests.dsv3_kernels.check_samples`."""

import os
import time

import jax
import numpy as np

from dsv3_kernels.gpu.case import CheckCase, Comparison, diff


def sleep_for_ever(x: jax.Array, form: str) -> jax.Array:
    while True:
        time.sleep(1)


def abort(x: jax.Array, form: str) -> jax.Array:
    print("what a case prints is no verdict", flush=True)
    os.abort()


def lose_the_device(x: jax.Array, form: str) -> jax.Array:
    raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")


def refuse(x: jax.Array, form: str) -> jax.Array:
    raise NotImplementedError("x is beyond this kernel")


def check_cases() -> list[CheckCase]:
    """What should be twice its input."""
    twice = Comparison("twice", lambda x: 2 * np.asarray(x), diff, 1e-6)
    return [
        CheckCase(op, name, lambda key: jax.random.normal(key, (8, 4)), run, (twice,), is_small=True)
        for op, name, run in (
            ("hanging", "sleeps for ever", sleep_for_ever),
            ("crashing", "aborts", abort),
            ("broken", "loses its device", lose_the_device),
            ("right", "doubles", lambda x, form: x + x),
            ("wrong", "adds one", lambda x, form: x + x + 1.0),
            ("refusing", "takes nothing", refuse),
        )
    ]
