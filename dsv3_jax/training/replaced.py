"""The functions a run's layers are made of, where its configuration file replaces some."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.config.check import check
from dsv3_jax.config.load import call_in_file
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import Functions, functions_for


def functions_in(path: str | Path, cfg: RunConfig) -> Functions:
    """What `get_functions(cfg)` of a configuration file returns; without it, those that `cfg.precision` names.

    Raises:
        ConfigError: it fails, or returns something else, or functions for parameters of another dtype.
    """
    found = call_in_file(path, "get_functions", cfg, is_optional=True)
    if found is None:
        return functions_for(cfg.precision)
    where, dtype = f"get_functions(cfg) of {shown(user_path(path))}", functions_for(cfg.precision).param_dtype
    check(isinstance(found, Functions), f"{where} returned {type(found).__name__}; it must return Functions.")
    check(
        found.param_dtype == dtype,
        f"{where} is for parameters of another dtype than precision={cfg.precision!r} has; begin with "
        "functions_for(cfg.precision).",
    )
    return found


def replaced(functions: Functions, precision: str) -> dict[str, str]:
    """The names of the fields that are not the precision's own, and of what stands there: what a checkpoint notes."""
    own = functions_for(precision)
    found = {field.name: getattr(functions, field.name) for field in dataclasses.fields(Functions)}
    return {name: _name(value) for name, value in found.items() if callable(value) and value != getattr(own, name)}


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)
