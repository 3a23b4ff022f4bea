"""Typed values of a configuration that somebody else wrote."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax.config.check import ConfigError, check

_REQUIRED = object()


def whole(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> int:
    """The whole number at `key`; a null counts as missing. Raises `ConfigError` when missing without a default."""
    value = _get(config, key, default)
    check(
        isinstance(value, int) and not isinstance(value, bool),
        f"config.json: {key}={value!r} must be a whole number; correct the file.",
    )
    return value


def real(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> float:
    """The number at `key` as a float; otherwise as `whole`."""
    value = _get(config, key, default)
    check(
        isinstance(value, (int, float)) and not isinstance(value, bool),
        f"config.json: {key}={value!r} must be a number; correct the file.",
    )
    return float(value)


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    if value is not None:
        return value
    if default is _REQUIRED:
        state = "is null" if key in config else "is missing"
        raise ConfigError(f"config.json: {key!r} {state}, but no model can be built without it; set it in the file.")
    return default
