"""Sizes of DeepSeek's experts in bf16, and ugly ones; shared by tests, compilation and benches.

V2-Lite has 64 experts of 1408 between layers of 2048; V3 has experts of 2048 between layers of 7168, of which a device
holds 8 where 32 share them. Gate and up are one matmul. Groups are of random sizes, 0.7 to 1.3 of the stated one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

SKIP = -1


class GroupedCase(NamedTuple):
    """Groups of rows side by side: group g owns sizes[g] blocks of `block` rows, `skipped` at the end are no one's."""

    name: str
    sizes: tuple[int, ...]
    inner: int
    """A: what a weight is multiplied along."""
    outer: int
    """Z."""
    block: int = 64
    skipped: int = 0
    is_small: bool = False
    is_quick: bool = False

    @property
    def num_rows(self) -> int:
        """Rows, those skipped included."""
        return (sum(self.sizes) + self.skipped) * self.block

    @property
    def block_group(self) -> np.ndarray:
        """int32 [M / block]."""
        owners = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)
        return np.concatenate([owners, np.full(self.skipped, SKIP, np.int32)])


class GroupedInputs(NamedTuple):
    """Fresh operands of a case, standard normal."""

    rows: Array
    weights: Array
    d_out: Array
    groups: Array


def _sizes(groups: int, expected: int, seed: int) -> tuple[int, ...]:
    factors = np.random.default_rng(seed).uniform(0.7, 1.3, groups)
    return tuple(int(size) for size in np.maximum(1, np.rint(expected * factors)))


def _layer(model: str, groups: int, blocks: int, inner: int, outer: int, *, is_quick: bool = False) -> GroupedCase:
    sizes = _sizes(groups, blocks, inner + outer)
    name = f"{model}_g{groups}_rows{blocks * 64}_{inner}x{outer}"
    return GroupedCase(name, sizes, inner, outer, is_quick=is_quick)


CASES = (
    _layer("v2_lite", 64, 12, 2048, 2816, is_quick=True),
    _layer("v2_lite", 64, 12, 1408, 2048),
    _layer("v2_lite", 64, 1, 2048, 2816, is_quick=True),
    _layer("v3", 8, 64, 7168, 4096, is_quick=True),
    _layer("v3", 8, 64, 2048, 7168),
    _layer("v3", 8, 1, 7168, 4096),
    GroupedCase("one_block", (1,), 64, 64, is_small=True),
    GroupedCase("empty_groups", (0, 3, 0, 1), 128, 136, is_small=True),
    GroupedCase("all_skipped", (0, 0), 64, 128, skipped=2, is_small=True),
    GroupedCase("odd_sizes", (1, 3), 200, 97, skipped=1, is_small=True),
    GroupedCase("tall_blocks", (2, 0, 1), 72, 320, block=128, is_small=True),
    GroupedCase("no_rows", (0, 0), 64, 64, is_small=True),
)


def make_inputs(case: GroupedCase, key: Array, *, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> GroupedInputs:
    """Standard normal operands; what is skipped holds values, too."""

    def normal(i: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.fold_in(key, i), shape, dtype)

    return GroupedInputs(
        rows=normal(0, case.num_rows, case.inner),
        weights=normal(1, len(case.sizes), case.inner, case.outer),
        d_out=normal(2, case.num_rows, case.outer),
        groups=jnp.asarray(case.block_group),
    )
