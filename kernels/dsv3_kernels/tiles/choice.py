"""The tile of each shape, from a table for this GPU, or from a model of an H100 for shapes that the table lacks.

A GPU without tables of its own uses those of H100. `tuning` writes them.
"""

import functools
import importlib.resources
import json
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_kernels import target
from dsv3_kernels.gpu import machine
from dsv3_kernels.sm90.tile import Tile
from dsv3_kernels.tiles import model
from dsv3_kernels.tiles.model import Problem

FOLDER, H100 = "tuned", "h100_sxm"
FOLDERS = {"NVIDIA H100 80GB HBM3": H100}
"""Tables of a device, in a folder of its name where none is given here."""
DENSE, CONTIGUOUS, MASKED, CONTRACTION = "dense", "contiguous", "masked", "contraction"
FILES = {DENSE: "fp8_gemm", CONTIGUOUS: "grouped_fp8_gemm", MASKED: "grouped_fp8_gemm", CONTRACTION: "grouped_fp8_gemm"}
"""Kinds of matmul, and the table each is in."""


def dense(m: int, n: int, k: int, *, out_dtype: jax.typing.DTypeLike, is_b_scaled_by_row: bool) -> Problem:
    """One matmul."""
    return Problem(m, n, k, 1, jnp.dtype(out_dtype).name, is_b_scaled_by_row)


def contiguous(m: int, n: int, k: int, *, out_dtype: jax.typing.DTypeLike) -> Problem:
    """m rows in blocks of 128, each with weights of its own."""
    return Problem(m, n, k, 1, jnp.dtype(out_dtype).name, max_block_m=128)


def masked(groups: int, m: int, n: int, k: int, *, out_dtype: jax.typing.DTypeLike) -> Problem:
    """Up to m rows a group. How many is known to the GPU only, and its loops over groups take registers: 176 spill."""
    return Problem(m, n, k, groups, jnp.dtype(out_dtype).name, max_block_m=128, max_block_n=160)


def contraction(groups: int, m: int, n: int, k: int) -> Problem:
    """A float32 sum a group, over its share of k, here taken as equal."""
    return Problem(m, n, max(k // groups, 128) // 128 * 128, groups, "float32", True)


def choose(kind: str, problem: Problem) -> Tile:
    """The tile of the table's row for this problem, or for one with as many rows in units of 64; else the model's."""
    key = key_of(problem)
    for row in table(kind):
        if row["kind"] == kind and row["problem"] == key:
            tile = Tile(**row["tile"])
            if _fits(problem, tile):
                return tile
    return model.best_tile(problem)


def table(kind: str) -> list[dict[str, Any]]:
    """Rows of the kind's table, of this process's GPU if it has one, else of H100."""
    return _read(FILES[kind], device_folder())


def device_folder() -> str:
    """The name of the folder of tables for the GPU that programs are compiled for; H100's where there is no GPU."""
    device = target.gpu()
    return FOLDERS.get(device.device_kind, machine.file_stem(device.device_kind)) if device is not None else H100


@functools.cache
def _read(name: str, folder: str) -> list[dict[str, Any]]:
    tables = importlib.resources.files("dsv3_kernels.tiles").joinpath(FOLDER)
    own = tables.joinpath(folder, f"{name}.json")
    path = own if own.is_file() else tables.joinpath(H100, f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def tuned_tiles(kind: str) -> list[tuple[Problem, Tile]]:
    """Each tile of the table once, with the first problem it is for."""
    found: dict[tuple[Tile, bool], Problem] = {}
    for row in table(kind):
        if row["kind"] == kind:
            problem = Problem(**row["problem"])
            found.setdefault((Tile(**row["tile"]), problem.is_b_scaled_by_row), problem)
    return [(problem, tile) for (tile, _), problem in found.items()]


def _fits(problem: Problem, tile: Tile) -> bool:
    """Whether the tile has room for a chunk of this output, which may be wider than the one it was tuned for."""
    return model.slots(problem, tile) > 0


def rounded(problem: Problem) -> Problem:
    """The problem that stands for it in a table: rows in full units of 64, those of one group's k in 1024."""
    k = -(-problem.k // 1024) * 1024 if problem.out_dtype == "float32" and problem.groups > 1 else problem.k
    return problem._replace(m=-(-problem.m // 64) * 64, k=k)


def key_of(problem: Problem) -> dict[str, Any]:
    """How a table names the problem."""
    return rounded(problem)._asdict()
