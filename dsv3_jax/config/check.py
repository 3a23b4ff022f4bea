"""How the project refuses what a user gave it."""

import dataclasses
import math
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args


class UserError(Exception):
    """Something the user can fix: the message gives value, rule and what to do. Programs exit with code 2 on it."""


class ConfigError(UserError, ValueError):
    """A configuration that contradicts itself or the data it meets."""


def check(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def divisors(number: int) -> list[int]:
    """Every whole number that divides `number`, from 1 up."""
    small = [factor for factor in range(1, math.isqrt(number) + 1) if number % factor == 0]
    return sorted({*small, *(number // factor for factor in small)})


def one_of(choices: Iterable[int], *, near: int) -> str:
    """The valid `choices` for a message, as "1, 2 or 4": of many, the six nearest to the value that was refused."""
    nearest = sorted(sorted(choices, key=lambda choice: abs(choice - near))[:6])
    *most, last = map(str, nearest)
    return f"{', '.join(most)} or {last}" if most else last


def check_finite(config: Any) -> None:
    """Refuses a field of the dataclass `config` that holds NaN, infinity, more than 64 bits or another type.

    Numbers and truth values are looked at, a number that may be None too.

    For the `__post_init__` of every configuration class, before its other checks: NaN passes or fails a comparison by
    how it is written.

    Raises:
        ConfigError: names field, value and class.
    """
    where = type(config).__name__
    for field in dataclasses.fields(config):
        value, place = getattr(config, field.name), f"({where}.{field.name})"
        kinds = get_args(field.type) or (field.type,)
        if value is None and NoneType in kinds:
            continue
        if field.type is bool:
            check(type(value) is bool, f"{field.name}={value!r} is not a truth value; give True or False {place}.")
        if int in kinds:
            check(type(value) is int, f"{field.name}={value!r} is not a whole number; give an int {place}.")
        if float in kinds:
            check(type(value) in (int, float), f"{field.name}={value!r} is not a number; give a float {place}.")
        if isinstance(value, float):
            check(math.isfinite(value), f"{field.name}={value} is not finite; give a finite number {place}.")
        if isinstance(value, int):
            check(-(2**63) <= value < 2**63, f"{field.name} has more than 64 bits; give a number below 2^63 {place}.")
