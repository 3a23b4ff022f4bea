"""One of torch's ways to solve a problem: launches to be timed, and how wrong their result is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A way with its inputs on the device."""

    launches: Sequence[Callable[[], Any]]
    """One for each set of inputs."""
    error: Callable[[Any], float]
    """The result of the first launch -> norm of its error against plain float32, over the norm."""


class Way(NamedTuple):
    """A way by its name."""

    column: str
    """Ways of one column compete: the fastest of them is reported."""
    name: str
    prepare: Callable[[int], Prepared]
    """A number of sets of inputs -> fresh ones; may raise whatever torch does."""
    limit: float
    """The error must be below."""
    is_compiled: bool = False
    """Whether torch compiles it, which takes seconds a shape."""


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, in float32."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
