"""Configurations that a run stored, by this version or another one.

A field added later must have a default under which a run does what it did before the field existed; a run stored
without it then resumes and exports. A removed field goes to `RETIRED`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv3_jax.config.check import ConfigError, check
from dsv3_jax.config.load import group_of, hints_of, to_dict
from dsv3_jax.config.run import RunConfig

ANY = object()
"""In `RETIRED`: whatever the value was, it decides nothing now."""

RETIRED: Mapping[str, Any] = {"data.shuffle_rows": ANY}
"""Fields that exist no more, by path, and the value of each that stands for what is done now."""


def complete(tree: Any, *, where: str, cls: Any = RunConfig, retired: Mapping[str, Any] = RETIRED) -> dict[str, Any]:
    """A stored configuration as this version would have stored it: with the defaults of fields added since.

    Args:
        tree: the JSON data; `where` names it in messages.
        cls: the class it is of.

    Raises:
        ConfigError: it is no configuration, has a field that this version does not know, or has a retired one with a
            value that nothing stands for now.
    """
    return _complete(tree, cls, "", where, retired)


def _complete(tree: Any, cls: Any, prefix: str, where: str, retired: Mapping[str, Any]) -> dict[str, Any]:
    name = prefix.rstrip(".") or "it"
    check(isinstance(tree, Mapping), f"{where}: {name} must be a group of fields; it holds something else.")
    hints = hints_of(cls)
    for field, value in tree.items():
        key = prefix + field
        if key in retired:
            check(
                retired[key] is ANY or value == retired[key],
                f"{where}: {key}={value!r} was written by another version of dsv3_jax; this one has no such field and "
                f"does what {retired[key]!r} meant: use that version.",
            )
        else:
            check(
                field in hints,
                f"{where}: unknown field {key!r}: a newer version of dsv3_jax wrote it; use that version.",
            )
    complete_tree: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key, group = prefix + field.name, group_of(hints[field.name])
        if field.name not in tree:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"{where}: field {key!r} is missing; bring back the file as it was.")
            complete_tree[field.name] = _as_json(field.default)
        elif group is not None and (tree[field.name] is not None or hints[field.name] is group):
            complete_tree[field.name] = _complete(tree[field.name], group, key + ".", where, retired)
        else:
            complete_tree[field.name] = tree[field.name]
    return complete_tree


def _as_json(default: Any) -> Any:
    if dataclasses.is_dataclass(default):
        return to_dict(default)
    return list(default) if isinstance(default, tuple) else default
