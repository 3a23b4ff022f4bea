"""Typed values of a config.json that somebody else wrote.

JSON as Python reads it holds NaN, infinities and numbers of any length; none of them leaves these functions.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from dsv3_jax.config.check import ConfigError, check

T = TypeVar("T")

_REQUIRED = object()


class _Brief(reprlib.Repr):
    """Cuts long texts and lists, and whole numbers that Python refuses to write out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 2**64 else f"(a number of {x.bit_length()} bits)"


def whole(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> int:
    """The whole number at `key`, which may be written 4096.0; a null counts as missing.

    Raises:
        ConfigError: missing without a default, or no whole number of at most 64 bits.
    """
    return as_whole(_get(config, key, default), f"config.json: {key}")


def real(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> float:
    """The finite number at `key` as a float; otherwise as `whole`."""
    value = _get(config, key, default)
    check(
        (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value)),
        f"config.json: {key}={shown(value)} must be a number, and finite; correct the file.",
    )
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """The truth value at `key`; a null is refused, as some programs read it as false and others as the default."""
    value = config.get(key, default)
    check(type(value) is bool, f"config.json: {key}={shown(value)} must be true or false; correct the file.")
    return value


def word(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> str:
    """The text at `key`; a null counts as missing."""
    value = _get(config, key, default)
    check(isinstance(value, str), f"config.json: {key}={shown(value)} must be a text; correct the file.")
    return value


def group(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at `key`; empty when missing or null."""
    value = config.get(key)
    check(value is None or isinstance(value, Mapping), f"config.json: {key}={shown(value)} is not an object.")
    return value or {}


def token_ids(config: Mapping[str, Any], key: str, *, vocab_size: int, name: str = "config.json") -> tuple[int, ...]:
    """The ids at `key`, which holds one or a list; none when it is missing or null. Messages call the file `name`.

    Raises:
        ConfigError: an empty list, or what is no id of the vocabulary.
    """
    value = config.get(key)
    if value is None:
        return ()
    found = value if isinstance(value, list | tuple) else [value]
    check(len(found) > 0, f"{name}: {key}=[] names no token; give an id, or leave the key out.")
    ids = tuple(as_whole(one, f"{name}: {key}") for one in found)
    for one in ids:
        check(0 <= one < vocab_size, f"{name}: {key}={one} is outside vocab_size={vocab_size}; correct the file.")
    return ids


def as_whole(value: Any, name: str) -> int:
    """`value` as an int; otherwise as `whole`, with `name` for the message."""
    number: Any = int(value) if type(value) is float and value.is_integer() else value
    check(
        type(number) is int and abs(number) < 2**63,
        f"{name}={shown(value)} must be a whole number of at most 64 bits; correct the file.",
    )
    return number


def agreed(values: Mapping[str, T]) -> T | None:
    """The one value that several keys give, None where there is none. Raises: `ConfigError` naming keys that differ."""
    found = list(values.items())
    for key, value in found[1:]:
        check(
            value == found[0][1],
            f"config.json: {found[0][0]}={shown(found[0][1])} contradicts {key}={shown(value)}, and programs differ in "
            "which of them they take; correct one or delete it.",
        )
    return found[0][1] if found else None


def shown(value: Any) -> str:
    """`value` for a message: a long one is cut, however deep or large it is."""
    return _Brief().repr(value)


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    if value is not None:
        return value
    if default is _REQUIRED:
        state = "is null" if key in config else "is missing"
        raise ConfigError(f"config.json: {key!r} {state}, but no model can be built without it; set it in the file.")
    return default
