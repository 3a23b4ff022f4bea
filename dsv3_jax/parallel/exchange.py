"""Experts on other devices: for now none."""

from typing import Any

from jax.sharding import Mesh

from dsv3_jax.config.check import check
from dsv3_jax.parallel.axes import EXPERTS
from dsv3_jax.parallel.mesh import size_of


def exchanged(functions: Any, mesh: Mesh, *, capacity: float | None, overflow: str) -> Any:
    """`functions` as they are, where every device has all experts."""
    check(size_of(mesh, EXPERTS) == 1, f"expert={size_of(mesh, EXPERTS)}: experts cannot be split; use 1.")
    return functions
