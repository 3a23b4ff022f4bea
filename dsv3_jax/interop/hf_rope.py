"""The rotary embedding in a config.json <-> theta with `YarnConfig`.

DeepSeek's code reads `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`. Programs differ in which
of two keys they take, so a file that gives a value twice must give the same one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dsv3_jax.config.check import check
from dsv3_jax.config.model import YarnConfig
from dsv3_jax.interop.fields import agreed, flag, group, real, shown, whole, word

_DIALECTS = ("rope_scaling", "rope_parameters")
_TOP_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_YARN_KEYS = (
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
)


def read_rope(config: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """(theta, YaRN) of a config.json.

    Raises:
        ConfigError: a type other than "default" and "yarn", an unknown key, two keys that contradict each other, or a
            YaRN whose magnitude transformers and DeepSeek's code compute differently.
    """
    dialects = {name: found for name in _DIALECTS if (found := group(config, name))}
    flat = {key: config.get(key) for key in _TOP_KEYS}
    flat |= {f"{name}.{key}": value for name, found in dialects.items() for key, value in found.items()}
    theta = agreed({key: real(flat, key) for key in _places(flat, dialects, "rope_theta")})
    for key in _places(flat, dialects, "partial_rotary_factor"):
        check(
            real(flat, key) == 1.0,
            f"config.json: {key}={shown(flat[key])} cannot be represented: our rope rotates all of qk_rope_head_dim; "
            "only 1 is read.",
        )
    yarns = [_yarn(flat, name, tuple(found)) for name, found in dialects.items()]
    check(
        all(yarn == yarns[0] for yarn in yarns),
        f"config.json: rope_scaling={shown(config.get('rope_scaling'))} contradicts "
        f"rope_parameters={shown(config.get('rope_parameters'))}, and programs differ in which of them they take; "
        "delete the wrong one.",
    )
    return 10000.0 if theta is None else theta, yarns[0] if yarns else None


def rope_scaling(yarn: YarnConfig) -> dict[str, Any]:
    """The official `rope_scaling` of a YaRN."""
    return {
        "type": "yarn",
        "factor": short(yarn.factor),
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": short(yarn.beta_fast),
        "beta_slow": short(yarn.beta_slow),
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def short(value: float) -> float | int:
    """10000.0 -> 10000, as the released files write it."""
    return int(value) if abs(value) < 2**53 and float(value).is_integer() else value


def _places(flat: Mapping[str, Any], dialects: Iterable[str], key: str) -> list[str]:
    """Where `key` has a value: at the top or in one of the objects."""
    return [place for place in (key, *(f"{name}.{key}" for name in dialects)) if flat.get(place) is not None]


def _yarn(flat: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> YarnConfig | None:
    """The YaRN of one dialect, None where its type is "default"."""
    types = [f"{name}.{key}" for key in ("rope_type", "type") if flat.get(f"{name}.{key}") is not None]
    kind = agreed({key: word(flat, key) for key in types}) or "default"
    check(
        kind in ("default", "yarn"),
        f"config.json: rope type {shown(kind)} cannot be represented; only 'default' (none) and 'yarn' are read.",
    )
    known = _KEYS + _YARN_KEYS if kind == "yarn" else _KEYS
    for key in keys:
        check(
            key in known or flat[f"{name}.{key}"] is None,
            f"config.json: {name} has the key {shown(key)}, which has no meaning for rope type {kind!r}; "
            f"known are {', '.join(known)}.",
        )
    if kind == "default":
        return None
    check(
        flag(flat, f"{name}.truncate", True),
        f"config.json: {name}.truncate=False cannot be represented; DeepSeek's YaRN has whole pairs as bounds.",
    )
    length = "original_max_position_embeddings"
    original = agreed({key: whole(flat, key) for key in _places(flat, [name], length)})
    yarn = YarnConfig(
        factor=real(flat, f"{name}.factor"),
        original_max_position=whole(flat, f"{name}.{length}") if original is None else original,
        beta_fast=real(flat, f"{name}.beta_fast", 32.0),
        beta_slow=real(flat, f"{name}.beta_slow", 1.0),
        mscale=real(flat, f"{name}.mscale", 1.0),
        mscale_all_dim=real(flat, f"{name}.mscale_all_dim", 0.0),
    )
    _check_magnitude(flat, name, yarn)
    return yarn


def _check_magnitude(flat: Mapping[str, Any], name: str, yarn: YarnConfig) -> None:
    """Refuses a YaRN whose factor on cosines and sines is not the same in DeepSeek's code and in transformers.

    DeepSeek's is m(mscale) / m(mscale_all_dim), with 1 and 0 for what is absent, where m(s) = 0.1·s·ln(factor) + 1.
    transformers takes `attention_factor`; without it the same quotient if both are given and not 0, else m(1).
    """

    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn.factor) + 1.0

    magnitude = m(yarn.mscale) / m(yarn.mscale_all_dim)
    if flat.get(f"{name}.attention_factor") is not None:
        stated = real(flat, f"{name}.attention_factor")
        check(
            math.isclose(stated, magnitude, rel_tol=1e-6),
            f"config.json: {name}.attention_factor={stated} contradicts mscale={yarn.mscale} with "
            f"mscale_all_dim={yarn.mscale_all_dim}, which give {magnitude:.7g}: transformers takes the first, "
            "DeepSeek's code the others; delete attention_factor or correct it.",
        )
        return
    if flat.get(f"{name}.mscale") and flat.get(f"{name}.mscale_all_dim"):
        return
    given, other = ("mscale_all_dim", "mscale") if yarn.mscale_all_dim else ("mscale", "mscale_all_dim")
    check(
        math.isclose(magnitude, m(1.0), rel_tol=1e-6),
        f"config.json: {name} has {given}={getattr(yarn, given)} without {other}, which is ambiguous: DeepSeek's code "
        "uses it, transformers ignores it; give both.",
    )
