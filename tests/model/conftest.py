"""The small model's parts for the tests of its equations."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.transformer import forward
from tests.small import make_config, make_variables

MakeConfig = Callable[..., ModelConfig]
MakeVariables = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def config() -> MakeConfig:
    return make_config


@pytest.fixture(scope="session")
def variables_of() -> MakeVariables:
    return make_variables


_forward = jax.jit(forward, static_argnames=("cfg", "functions"))


@pytest.fixture(scope="session")
def run_forward():
    """`forward`, compiled once for each configuration and shape in a whole test session."""
    return _forward


@pytest.fixture(autouse=True, scope="module")
def quickly(compile_quickly: None) -> None:
    """Every test here compiles quickly."""
