"""Reads a configuration file, applies `--set` overrides, and writes configurations as JSON.

A file is Python with `get_config() -> RunConfig`, and may have `get_functions(cfg)`. Overrides name a field by its path
(`train.lr.peak=1e-3`); they are applied together before validation, so that fields which only make sense together can
change together.
"""

import dataclasses
import difflib
import json
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config.check import ConfigError, UserError, check
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class Difference:
    """One key in which two configurations differ; `ABSENT` where a side lacks it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.old)} -> {_show(self.new)}"


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()

NO_MORE: Mapping[str, str] = {"data.shuffle_rows": "all rows of an epoch are shuffled"}
"""Fields that decided what is no choice any more, and why: `--set` passes over them with a line on stderr."""

NOT_BUILT: Mapping[str, str] = {
    "parallel.sequence": (
        "context parallelism is not built: no axis splits a sequence; the axes are pipe, data, expert and tensor, and "
        "train.remat=full or parallel.gather=layer make room for longer rows"
    ),
}
"""Fields that are looked for here because others have them, and what there is instead."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that the Python file at `path` returns, with `overrides` ("a.b=value") applied.

    Args:
        path: a file that defines `get_config()`.
        overrides: in order; a later one wins.

    Raises:
        ConfigError: no such file, no `get_config`, whatever the file raises (with its line), unknown key (the nearest
            is suggested), a value of the wrong type, or fields that contradict each other.
    """
    cfg = call_in_file(path, "get_config")
    check(
        isinstance(cfg, RunConfig),
        f"get_config() of {shown(user_path(path))} returned {type(cfg).__name__}; it must return a RunConfig.",
    )
    return override(cfg, overrides)


def call_in_file(path: str | Path, function: str, *arguments: Any, is_optional: bool = False) -> Any:
    """What `function(*arguments)` of the Python file at `path` returns; None where an optional one is not defined.

    The file is run, not imported: Python would leave, and trust, a compiled copy.

    Raises:
        ConfigError: no such file, no such function, or whatever the file raises, with its line.
    """
    path = user_path(path)
    names: dict[str, Any] = {"__name__": f"dsv3_jax_config_{path.stem}", "__file__": str(path)}
    source = _source(path)
    try:
        exec(compile(source, str(path), "exec"), names)
        if function not in names and is_optional:
            return None
        if function not in names:
            raise ConfigError(f"defines no {function}() -> RunConfig")
        return names[function](*arguments)
    except (Exception, SystemExit) as error:  # the file is the user's: whatever it raises is a user's error
        raise ConfigError(f"config file {shown(path)}{_line_of(error, path)}: {_reason(error)}") from error


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"config file {shown(path)} does not exist; see configs/ for those that come with it."
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"config file {shown(path)} is a folder; give a Python file such as configs/tiny.py."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {shown(path)} cannot be read: {error}.") from error


def _reason(error: BaseException) -> str:
    """The message of `error`, in one line."""
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"


def _line_of(error: BaseException, path: Path) -> str:
    """The line of the file where `error` arose, as ", line 12"; empty when it did not arise there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def override(cfg: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`cfg` with every "a.b=value" applied; values are read by the type of the field they replace.

    Numbers may be written 4096, 4_096 or 4e3; `none` empties an optional field, `default` fills an optional group;
    lists are comma-separated or JSON.
    """
    tree = to_dict(cfg)
    for text in overrides:
        key, sign, value = text.partition("=")
        check(
            sign == "=" and key != "",
            f"--set {_short(text)!r} is not of the form key=value, such as train.lr.peak=1e-3.",
        )
        if key.strip() in NO_MORE:
            print(f"--set {key.strip()} has no effect any more: {NO_MORE[key.strip()]}.", file=sys.stderr)
        else:
            _assign(tree, key.strip(), value)
    return from_dict(tree)


def to_dict(cfg: Any) -> dict[str, Any]:
    """A configuration as plain JSON data (tuples become lists); `from_dict` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def from_dict(tree: Mapping[str, Any], cls: Any = RunConfig) -> Any:
    """The configuration of class `cls` of which `to_dict` made `tree`.

    Raises:
        ConfigError: a key missing or unknown, a value of the wrong type, or contradictory fields.
    """
    return _build(cls, tree, "")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.lr.peak": 1e-3, ...}: the leaves of a nested dict by dotted path."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        leaves |= flatten(value, key + ".") if isinstance(value, Mapping) and value else {key: value}
    return leaves


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every leaf in which two configurations (as `to_dict` gives them) differ, in the order of `old`."""
    left, right = flatten(old), flatten(new)
    pairs = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in {**left, **right}]
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def fields_of(cls: Any = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every key that `--set` takes, with the type it reads."""
    keys: dict[str, Any] = {}
    for name, hint in hints_of(cls).items():
        group = group_of(hint)
        if group is None or _optional(hint):
            keys[prefix + name] = hint
        if group is not None:
            keys |= fields_of(group, f"{prefix}{name}.")
    return keys


def hints_of(cls: Any) -> dict[str, Any]:
    """The type of each field of a configuration class."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def group_of(hint: Any) -> Any:
    """The configuration class that a field of type `hint` holds, None when it holds a plain value."""
    plain = _inner(hint) if _optional(hint) else hint
    return plain if dataclasses.is_dataclass(plain) else None


def _assign(tree: dict[str, Any], key: str, text: str) -> None:
    known = fields_of()
    if key not in known:
        inside = [name for name in known if name.startswith(key + ".")]
        if inside:
            raise ConfigError(f"--set {key!r} names a group; set one of its fields: {', '.join(inside)}.")
        if key in NOT_BUILT:
            raise ConfigError(f"--set {key!r}: {NOT_BUILT[key]}.")
        near = _nearest(key, known)
        raise ConfigError(f"--set {_short(key)!r}: unknown key" + (f"; did you mean {near!r}?" if near else "."))
    *parents, name = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        if node[parent] is None:
            group = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {key!r}: {group} is none; put --set {group}=default before it.")
        node = node[parent]
    node[name] = _parse(text, known[key], key)


def _nearest(key: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_name: dict[str, str] = {}
    for full in known:
        by_name.setdefault(full.rpartition(".")[2], full)
    tail = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.6)
    return by_name[tail[0]] if tail else next(iter(difflib.get_close_matches(key, known, n=1)), None)


def _parse(text: str, hint: Any, key: str) -> Any:
    """The JSON value that `text` means for a field of type `hint`."""
    if hint is str:
        return text
    text = text.strip()
    said = f"--set {key}={shown(_short(text))}"
    wrong = ConfigError(f"{said}: not {_described(hint)}.")
    if _optional(hint):
        if text.lower() in ("none", "null"):
            return None
        return _parse(text, _inner(hint), key)
    if dataclasses.is_dataclass(hint):
        if text != "default":
            raise ConfigError(f"{said}: a group takes 'default' or 'none'; set its fields one by one.")
        return to_dict(typing.cast(Any, hint)())
    if typing.get_origin(hint) is typing.Literal:
        for choice in typing.get_args(hint):
            if text == str(choice):
                return choice
        raise wrong
    if typing.get_origin(hint) is tuple:
        return _parse_list(text, hint, key)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    try:
        if hint is int:
            return _whole(text)
        return float(text)
    except ValueError:
        raise wrong from None


def _parse_list(text: str, hint: Any, key: str) -> list[Any]:
    item = typing.get_args(hint)[0]
    if text.startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError(f"--set {key}={shown(_short(text))}: not a JSON list.") from None
        return [_convert(value, item, key) for value in values]
    said, parts = shown(_short(text)), [part.strip() for part in text.split(",")]
    check(
        all(parts),
        f"--set {key}={said}: an item is empty (a variable that is not set?); write {key}=a,b, or {key}=[] for none.",
    )
    return [_parse(part, item, key) for part in parts]


def _whole(text: str) -> int:
    """4096, 4_096 or 4e3, exactly."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if value != value or abs(value) > 2**63 or value != int(value):
            raise ValueError(text) from None
        return int(value)


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    where = prefix.rstrip(".") or "the configuration"
    check(isinstance(tree, Mapping), f"{where} must be a group of fields, not {tree!r}.")
    hints = hints_of(cls)
    for name in tree:
        check(name in hints, f"unknown key {prefix + name!r}; {cls.__name__} has {', '.join(hints)}.")
    for name in hints:
        check(name in tree, f"key {prefix + name!r} is missing; it was written by another version.")
    return cls(**{name: _convert(tree[name], hint, prefix + name) for name, hint in hints.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The field value of type `hint` that the JSON data `value` stands for."""
    if _optional(hint):
        return None if value is None else _convert(value, _inner(hint), key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key + ".")
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, list | tuple), f"{key}={value!r}: not {_described(hint)}.")
        return tuple(_convert(item, typing.get_args(hint)[0], key) for item in value)
    if typing.get_origin(hint) is typing.Literal:
        check(value in typing.get_args(hint), f"{key}={value!r}: not {_described(hint)}.")
        return value
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    check(type(value) is hint, f"{key}={value!r}: not {_described(hint)}.")
    return value


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _inner(hint: Any) -> Any:
    return next(arg for arg in typing.get_args(hint) if arg is not type(None))


def _described(hint: Any) -> str:
    if _optional(hint):
        return f"{_described(_inner(hint))}, or none"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_described(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def _show(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else repr(value)
