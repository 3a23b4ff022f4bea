"""Plans near one that does not fit: a few fields of the configuration changed, on as many devices."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.run import RunConfig
from dsv3_jax.parallel.axes import ROWS
from dsv3_jax.parallel.mesh import mesh_shape, size_of
from dsv3_jax.planning.held import Held, Sizes, held

CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": ("fp8_dsv3",),
    "train.remat": ("paper", "received", "full"),
    "parallel.schedule": ("dualpipe_v",),
    "parallel.overflow": ("drop",),
    "parallel.capacity": (1.25, 1.0),
    "parallel.expert_nodes": (1,),
    "parallel.tensor": (2, 4),
    "parallel.expert": (16, 32, 64, 128, 256),
    "parallel.pipe": (4, 8, 16),
}
"""What may change, in the order in which a user would rather change it."""
MOST_CHANGES = 2


class Plan(NamedTuple):
    """A configuration that fits."""

    changes: dict[str, Any]
    """All that `--set` takes to come there, with what follows from the others."""
    held: Held


def nearest(cfg: RunConfig, shape: Mapping[str, int], limit: int, *, most: int = 3) -> list[Plan]:
    """Plans that hold at most `limit` bytes a device, with as few changes as any; the smallest first."""
    for number in range(1, MOST_CHANGES + 1):
        found = [plan for plan in _plans(cfg, shape, number) if plan.held.total <= limit]
        if found:
            return sorted(found, key=lambda plan: plan.held.total)[:most]
    return []


def _plans(cfg: RunConfig, shape: Mapping[str, int], number: int) -> Iterator[Plan]:
    """All with so many changes that are valid."""
    num_devices, rows_a_device = math.prod(shape.values()), cfg.train.batch.micro // size_of(Sizes(dict(shape)), ROWS)
    for keys in itertools.combinations(CHOICES, number):
        for values in itertools.product(*(CHOICES[key] for key in keys)):
            changes = dict(zip(keys, values, strict=True))
            if all(_get(cfg, key) != value for key, value in changes.items()):
                plan = _plan(cfg, num_devices, rows_a_device, changes)
                if plan is not None:
                    yield plan


def _plan(cfg: RunConfig, num_devices: int, rows_a_device: int, changes: dict[str, Any]) -> Plan | None:
    """None where the changes do not go together, or not with the number of devices; each has as many rows as before."""
    try:
        parallel = dataclasses.replace(cfg.parallel, **_of(changes, "parallel."), data=-1)
        shape = mesh_shape(parallel, num_devices)
        batch = dataclasses.replace(cfg.train.batch, micro=rows_a_device * size_of(Sizes(shape), ROWS))
        train = dataclasses.replace(cfg.train, **_of(changes, "train."), batch=batch)
        precision = changes.get("precision", cfg.precision)
        changed = dataclasses.replace(cfg, precision=precision, train=train, parallel=parallel)
        following = {"train.batch.micro": batch.micro, "parallel.data": shape["data"]}
        following = {key: value for key, value in following.items() if _get(cfg, key) not in (value, -1)}
        return Plan(changes | following, held(changed, shape))
    except ConfigError:
        return None


def _of(changes: dict[str, Any], group: str) -> dict[str, Any]:
    return {key.removeprefix(group): value for key, value in changes.items() if key.startswith(group)}


def _get(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg
