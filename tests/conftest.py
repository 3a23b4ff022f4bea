"""The strict surroundings of every test: eight CPU devices, no silent promotion, checked signatures.

Environment: `DSV3_TYPECHECK=0` turns off the checking of signatures; `JAX_PLATFORMS=cuda` runs the tests on a GPU;
`DSV3_TEST_SEED=N` draws what a test that failed had drawn.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))

import hypothesis
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

from tests.fresh import fresh_rng

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# No test fails because a machine is slow.
hypothesis.settings.register_profile("without_clock", deadline=None)
hypothesis.settings.load_profile("without_clock")

if os.environ.get("DSV3_TYPECHECK", "1") != "0":
    # The tower lets an int stand for a float, as the language itself does.
    install_import_hook(
        ["dsv3_jax", "dsv3_kernels"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if all(item.get_closest_marker("gpu") is None for item in items) or jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason=f"needs a GPU; jax runs on {jax.default_backend()} (set JAX_PLATFORMS=cuda)")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Drops compiled programs when a process holds many.

    Each keeps some pages mapped, and Linux ends a process that maps more than `vm.max_map_count` (65530) regions.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key."""
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers of this run; see `fresh_rng`."""
    return fresh_rng()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of expected values."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """Leaves out most optimisations: tests that compile much and compute little take half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
