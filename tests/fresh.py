"""Random numbers that differ from run to run, and can be had again."""

import os
import secrets

import numpy as np
from hypothesis import settings

SEED_VARIABLE = "DSV3_TEST_SEED"


def fresh_rng() -> np.random.Generator:
    """A generator with a new seed, which pytest shows where a test fails; `DSV3_TEST_SEED` gives that seed again.

    Where hypothesis draws the same examples in every run, as it does under CI, the seed is 0.
    """
    given = os.environ.get(SEED_VARIABLE)
    seed = secrets.randbits(32) if given is None and not settings().derandomize else int(given or 0)
    print(f"random numbers of this test: {SEED_VARIABLE}={seed}")
    return np.random.default_rng(seed)
