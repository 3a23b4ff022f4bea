"""The shapes of DeepSeek-V3's experts, and ugly ones; shared by tests, compilation and benches.

N x K: 4096 x 7168 is gate and up of an expert, 7168 x 2048 its down; 6144 x 7168, 7168 x 3072, 4096 x 4096 and
4096 x 2048 belong to later models. The lists are those DeepGEMM is tested with: groups of equal size (2025-02), and of
random size within 0.7 to 1.3 of the stated one, in full blocks of 128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_kernels.gemm.cases import normal
from dsv3_kernels.operands import BLOCK
from dsv3_kernels.quantize import QTensor, quantize_tiles

FIRST_LAYERS = ((4096, 7168), (7168, 2048))
LATER_LAYERS = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
SKIP = -1


class ContiguousCase(NamedTuple):
    """Groups of rows side by side: group g owns blocks[g] blocks of 128 rows, `skipped` at the end are no one's."""

    name: str
    blocks: tuple[int, ...]
    n: int
    k: int
    skipped: int = 0
    is_small: bool = False

    @property
    def m(self) -> int:
        """Rows, those skipped included."""
        return (sum(self.blocks) + self.skipped) * BLOCK

    @property
    def block_group(self) -> np.ndarray:
        """int32 [m / 128]."""
        return _block_group(self.blocks, self.skipped)


class MaskedCase(NamedTuple):
    """m rows a group, of which the first valid[g] are tokens."""

    name: str
    valid: tuple[int, ...]
    m: int
    n: int
    k: int
    is_small: bool = False


class ContractionCase(NamedTuple):
    """Groups along the contraction: group g owns blocks[g] blocks of 128 tokens, `skipped` at the end are no one's."""

    name: str
    blocks: tuple[int, ...]
    m: int
    n: int
    skipped: int = 0
    accumulates: bool = False
    is_small: bool = False

    @property
    def k(self) -> int:
        """The contraction, what is skipped included."""
        return (sum(self.blocks) + self.skipped) * BLOCK

    @property
    def block_group(self) -> np.ndarray:
        """int32 [k / 128]."""
        return _block_group(self.blocks, self.skipped)


class GroupedInputs(NamedTuple):
    """Fresh operands of a case, and the bfloat16 values that they were quantised from."""

    a: QTensor
    b: QTensor
    groups: Array
    """The block_group or the valid_rows of the case."""
    accumulate_into: Array | None
    exact_a: Array
    exact_b: Array


def _block_group(blocks: tuple[int, ...], skipped: int) -> np.ndarray:
    return np.repeat(np.array([*range(len(blocks)), SKIP], np.int32), [*blocks, skipped])


def _random_sizes(groups: int, size: int, seed: int) -> tuple[int, ...]:
    """Sizes within 0.7 to 1.3 of `size`; always the same ones for a seed."""
    return tuple(int(size * x) for x in np.random.default_rng(seed).uniform(0.7, 1.3, groups))


def _random_blocks(groups: int, rows: int, seed: int) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in _random_sizes(groups, rows, seed))


def _contiguous(groups: int, rows: int, n: int, k: int) -> ContiguousCase:
    return ContiguousCase(f"g{groups}_m{rows}_n{n}_k{k}", (rows // BLOCK,) * groups, n, k)


def _ragged(groups: int, rows: int, n: int, k: int) -> ContiguousCase:
    return ContiguousCase(f"g{groups}_m{rows}_n{n}_k{k}_ragged", _random_blocks(groups, rows, n + k), n, k)


def _masked(groups: int, rows: int, n: int, k: int) -> MaskedCase:
    return MaskedCase(f"g{groups}_m{rows}_n{n}_k{k}", (rows,) * groups, rows, n, k)


def _partly_masked(groups: int, rows: int, n: int, k: int) -> MaskedCase:
    choices = [size for size in (64, 128, 192, 256, 320, 384) if size <= rows]
    valid = tuple(int(size) for size in np.random.default_rng(n + k).choice(choices, groups))
    return MaskedCase(f"g{groups}_m{rows}_n{n}_k{k}_partly", valid, rows, n, k)


def _decoding(groups: int, expected: int, n: int, k: int) -> MaskedCase:
    valid = _random_sizes(groups, expected, n + k)
    return MaskedCase(f"g{groups}_expected{expected}_m4096_n{n}_k{k}", valid, 4096, n, k)


def _contraction(groups: int, k: int, m: int, n: int) -> list[ContractionCase]:
    """Sizes one block above or below `k`, with and without accumulation; and with a quarter of the groups empty."""
    signs = np.random.default_rng(m + n).choice((-1, 1), groups)
    blocks = tuple(int(k // BLOCK + sign) for sign in signs)
    full = ContractionCase(f"g{groups}_k{k}_m{m}_n{n}", blocks, m, n)
    empty = tuple(0 if group % 4 == 1 else size for group, size in enumerate(blocks))
    return [
        full,
        full._replace(name=f"{full.name}_added", accumulates=True),
        full._replace(name=f"{full.name}_empty_added", blocks=empty, accumulates=True),
    ]


HEADLINE_CONTIGUOUS = tuple(
    _contiguous(groups, rows, n, k) for groups, rows in ((4, 8192), (8, 4096)) for n, k in FIRST_LAYERS
)
HEADLINE_MASKED = tuple(
    _masked(groups, rows, n, k) for groups, rows in ((1, 1024), (2, 512), (4, 256)) for n, k in FIRST_LAYERS
)
"""The shapes of DeepGEMM's published tables."""

CONTIGUOUS_CASES = (
    *HEADLINE_CONTIGUOUS,
    *(
        _ragged(groups, rows, n, k)
        for groups, rows in ((4, 8192), (8, 4096))
        for n, k in (*FIRST_LAYERS, *LATER_LAYERS)
    ),
    ContiguousCase("one_row_block", (1,), 128, 128, is_small=True),
    ContiguousCase("empty_groups", (0, 2, 0, 1), 136, 256, is_small=True),
    ContiguousCase("all_skipped", (0, 0), 64, 128, skipped=2, is_small=True),
    ContiguousCase("odd_columns", (1, 3), 97, 384, skipped=1, is_small=True),
    ContiguousCase("odd_contraction", (2, 1), 130, 200, is_small=True),
    ContiguousCase("no_rows", (0, 0), 128, 128, is_small=True),
)
MASKED_CASES = (
    *HEADLINE_MASKED,
    *(_partly_masked(groups, rows, n, k) for groups, rows in ((1, 1024), (2, 512), (4, 256)) for n, k in FIRST_LAYERS),
    *(
        _decoding(groups, expected, n, k)
        for groups, expected in ((32, 192), (6, 1024), (32, 20), (6, 20))
        for n, k in LATER_LAYERS
    ),
    MaskedCase("one_row", (1,), 1, 128, 128, is_small=True),
    MaskedCase("empty_group", (0, 97, 1), 128, 136, 256, is_small=True),
    MaskedCase("odd_rows", (97, 1025, 0), 1025, 64, 128, is_small=True),
    MaskedCase("odd_contraction", (5, 33), 40, 97, 200, is_small=True),
)
CONTRACTION_CASES = (
    *(
        case
        for groups, k in ((4, 4096), (4, 8192), (8, 4096))
        for m, n in ((7168, 4096), (2048, 7168))
        for case in _contraction(groups, k, m, n)
    ),
    *(
        case
        for groups, k in ((4, 8192), (8, 4096), (16, 2048))
        for m, n in ((4096, 7168), (7168, 2048))
        for case in _contraction(groups, k, m, n)
    ),
    ContractionCase("one_block", (1,), 128, 128, is_small=True),
    ContractionCase("empty_groups", (0, 2, 0, 1, 0), 97, 130, is_small=True),
    ContractionCase("empty_groups_added", (0, 2, 0, 1, 0), 97, 130, accumulates=True, is_small=True),
    ContractionCase("skipped_end", (2, 1), 1, 136, skipped=2, accumulates=True, is_small=True),
    ContractionCase("no_tokens", (0, 0), 64, 64, is_small=True),
)


def make_contiguous(case: ContiguousCase, key: Array, *, scale: str = "float32") -> GroupedInputs:
    """Standard normal operands in bfloat16, quantised with `scale` ("float32" or "ue8m0")."""
    exact_a, exact_b = _normals(key, (case.m, case.k), (len(case.blocks), case.n, case.k))
    return _inputs(exact_a, exact_b, (128, 128), case.block_group, None, scale)


def make_masked(case: MaskedCase, key: Array, *, scale: str = "float32") -> GroupedInputs:
    """Standard normal operands in bfloat16, quantised with `scale`; padding rows hold values, too."""
    groups = len(case.valid)
    exact_a, exact_b = _normals(key, (groups, case.m, case.k), (groups, case.n, case.k))
    return _inputs(exact_a, exact_b, (128, 128), np.array(case.valid, np.int32), None, scale)


def make_contraction(case: ContractionCase, key: Array, *, scale: str = "float32") -> GroupedInputs:
    """Standard normal operands in bfloat16, quantised with `scale`, and sums to add to where the case wants them."""
    exact_a, exact_b = _normals(key, (case.m, case.k), (case.n, case.k))
    shape = (len(case.blocks), case.m, case.n)
    sums = jax.random.normal(jax.random.fold_in(key, 2), shape, jnp.float32) if case.accumulates else None
    return _inputs(exact_a, exact_b, (1, 128), case.block_group, sums, scale)


def _normals(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    return [normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]


def _inputs(
    exact_a: Array, exact_b: Array, b_tile: tuple[int, int], groups: np.ndarray, sums: Array | None, scale: str
) -> GroupedInputs:
    a, b = quantize_tiles(exact_a, tile=(1, 128), scale=scale), quantize_tiles(exact_b, tile=b_tile, scale=scale)
    return GroupedInputs(a, b, jnp.asarray(groups), sums, exact_a, exact_b)
