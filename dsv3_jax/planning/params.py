"""Parameters of a configuration, counted by part from shapes alone.

    python -m dsv3_jax.planning.params configs/dsv3_671b.py           # a table
    python -m dsv3_jax.planning.params configs/dsv3_671b.py --json    # the same as one JSON object
    python -m dsv3_jax.planning.params configs/dsv3_671b.py --tree    # path, shape, dtype and axes, one line a leaf

Nothing is allocated: the 671B model takes seconds.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError
from dsv3_jax.config.load import load_config
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.hf_names import official_tensors
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.params import ParamSpec, abstract_params

PARTS: tuple[str, ...] = (
    "embedding",
    "attention",
    "dense feed-forward",
    "routed experts",
    "shared experts",
    "router",
    "norms",
    "MTP projection",
    "head",
)

_ATTENTION = ("q", "q_down", "q_up", "kv_down", "kv_up", "out")


@dataclasses.dataclass(frozen=True)
class PartCount:
    """Parameters of one part.

    `main`: in the main model. `activated`: of those, what one token uses. `mtp`: in the multi-token-prediction
    modules, which share embedding and head with the main model and so count neither.
    """

    part: str
    main: int
    activated: int
    mtp: int


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The official files: tensors with their scales and with MTP's copies of embedding and head; payload bytes."""

    num_tensors: int
    num_elements: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """What the table prints. Router biases count as parameters, as in the released figure of 671B."""

    parts: tuple[PartCount, ...]
    fp8_files: FileLayout
    bfloat16_files: FileLayout

    @property
    def main(self) -> int:
        """Parameters of the main model."""
        return sum(part.main for part in self.parts)

    @property
    def mtp(self) -> int:
        """Parameters that only the multi-token-prediction modules have."""
        return sum(part.mtp for part in self.parts)

    @property
    def activated(self) -> int:
        """Parameters one token uses, the whole embedding table and head included."""
        return sum(part.activated for part in self.parts)

    @property
    def activated_without_embedding(self) -> int:
        """Parameters one token uses, but for the embedding table, of which it reads one row."""
        return self.activated - next(part.activated for part in self.parts if part.part == "embedding")


def report(cfg: ModelConfig) -> ParameterReport:
    """Counts every parameter of `cfg` and the tensors of its official file layouts, in FP8 and in bfloat16."""
    main = dict.fromkeys(PARTS, 0)
    mtp = dict.fromkeys(PARTS, 0)
    for path, spec in leaves(abstract_params(cfg)):
        counts = mtp if path.split("/")[1] == "mtp" else main
        counts[part_of(path)] += math.prod(spec.shape)
    used = Fraction(cfg.moe.top_k, cfg.moe.num_experts)
    activated = {part: int(count * used) if part == "routed experts" else count for part, count in main.items()}
    return ParameterReport(
        parts=tuple(
            PartCount(part, main[part], activated[part], mtp[part]) for part in PARTS if main[part] + mtp[part]
        ),
        fp8_files=_file_layout(cfg, "float8_e4m3fn"),
        bfloat16_files=_file_layout(cfg, "bfloat16"),
    )


def leaves(tree: dict) -> Iterator[tuple[str, ParamSpec]]:
    """Every leaf of an abstract tree with its slash-separated path, in the tree's own (sorted) order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, ParamSpec))
    for path, spec in flat:
        yield "/".join(entry.key for entry in path), spec


def part_of(path: str) -> str:
    """The part, one of `PARTS`, that a path of the parameter tree belongs to.

    Raises:
        ValueError: a path that no part claims, so that nothing is left uncounted.
    """
    names = path.split("/")
    if "experts" in names:
        return "routed experts"
    if "shared" in names:
        return "shared experts"
    if "router" in names:
        return "router"
    if "mlp" in names:
        return "dense feed-forward"
    if "mla" in names and names[-1] in _ATTENTION:
        return "attention"
    if names[-1] in ("scale", "q_norm", "kv_norm"):
        return "norms"
    if names[1] == "embed":
        return "embedding"
    if names[1] == "unembed":
        return "head"
    if names[1:3] == ["mtp", "proj"]:
        return "MTP projection"
    raise ValueError(f"{path} belongs to no part; name it in planning.params.part_of.")


def tree_lines(cfg: ModelConfig) -> Iterator[str]:
    """The parameter tree as text: path, shape, dtype and logical axes, one line a leaf."""
    for path, spec in leaves(abstract_params(cfg)):
        shape = ",".join(map(str, spec.shape))
        axes = ",".join(axis or "-" for axis in spec.axes)
        yield f"{path} [{shape}] {spec.dtype} ({axes})"


def as_json(counted: ParameterReport) -> dict:
    """The report as plain JSON data."""
    totals = ("main", "mtp", "activated", "activated_without_embedding")
    return {**{name: getattr(counted, name) for name in totals}, **dataclasses.asdict(counted)}


def table(name: str, counted: ParameterReport) -> str:
    """The report as text."""
    rows = [("part", "main model", "activated a token", "MTP (unique)")]
    rows += [(part.part, f"{part.main:,}", f"{part.activated:,}", f"{part.mtp:,}") for part in counted.parts]
    rows += [("total", f"{counted.main:,}", f"{counted.activated:,}", f"{counted.mtp:,}")]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    rule = "-" * len(lines[0])
    layouts = [("FP8 blocks", counted.fp8_files), ("bfloat16", counted.bfloat16_files)]
    return "\n".join(
        [
            f"{name}: {counted.main:,} parameters in the main model, {counted.mtp:,} more in MTP",
            "",
            lines[0],
            rule,
            *lines[1:-1],
            rule,
            lines[-1],
            "",
            f"activated a token: {counted.activated / 1e9:.2f} B, "
            f"{counted.activated_without_embedding / 1e9:.2f} B without the embedding table",
            *(
                f"official files, {label}: {files.num_tensors:,} tensors, {files.num_elements:,} elements, "
                f"{files.num_bytes:,} bytes ({files.num_bytes / 2**30:,.1f} GiB)"
                for label, files in layouts
            ),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.planning.params", description="Counts the parameters of a configuration."
    )
    add_config_arguments(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one JSON object")
    shape.add_argument("--tree", action="store_true", help="path, shape, dtype and axes, one line a leaf")
    args = parser.parse_args(arguments)
    try:
        cfg = load_config(args.config, args.set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.tree:
        print("\n".join(tree_lines(cfg.model)))
    elif args.json:
        print(json.dumps(as_json(report(cfg.model)), indent=1))
    else:
        print(table(cfg.name, report(cfg.model)))
    return 0


def _file_layout(cfg: ModelConfig, dtype: str) -> FileLayout:
    num_tensors = num_elements = num_bytes = 0
    for _, shape, stored in official_tensors(cfg, dtype):
        elements = math.prod(shape)
        num_tensors += 1
        num_elements += elements
        num_bytes += elements * jnp.dtype(stored).itemsize
    return FileLayout(num_tensors, num_elements, num_bytes)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *numbers])


if __name__ == "__main__":
    run_program(main)
