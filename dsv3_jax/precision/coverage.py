"""What is multiplied in FP8 and what is not: the one table, for tests and for the README (report section 3.3.1)."""

from typing import NamedTuple


class Row(NamedTuple):
    """A part of the model. `weights`: how the paths of its parameters end; none for what has no parameters."""

    part: str
    weights: tuple[str, ...]
    is_fp8: bool
    arithmetic: str


COVERAGE: tuple[Row, ...] = (
    Row(
        "attention's projections",
        ("mla/q", "mla/q_down", "mla/q_up", "mla/kv_down", "mla/kv_up", "mla/out"),
        True,
        "forward, input gradient and weight gradient in FP8",
    ),
    Row(
        "feed-forward of dense layers",
        ("mlp/gate_up", "mlp/down"),
        True,
        "the same; SwiGLU's inputs saved in FP8",
    ),
    Row("shared experts", ("shared/gate_up", "shared/down"), True, "the same"),
    Row(
        "routed experts",
        ("experts/gate_up", "experts/down"),
        True,
        "the same, grouped; rows sent in FP8 with power-of-two scales, sums in bfloat16",
    ),
    Row("embedding", ("embed/w",), False, "a lookup, in bfloat16"),
    Row("output head", ("unembed/w",), False, "bfloat16 operands, float32 logits"),
    Row("router", ("router/w",), False, "float32: a choice must not depend on rounding"),
    Row("norms", ("scale", "mla/q_norm", "mla/kv_norm"), False, "float32"),
    Row("attention core", (), False, "bfloat16 matmuls, float32 scores and softmax"),
    Row("MTP projection", ("proj/w",), False, "bfloat16, as in the released FP8 files"),
)


def row_of(path: str) -> Row:
    """The row that a parameter's path (slash-separated) belongs to.

    Raises:
        ValueError: no row, or more than one, claims the path.
    """
    found = [row for row in COVERAGE if any(("/" + path).endswith("/" + end) for end in row.weights)]
    if len(found) != 1:
        raise ValueError(f"{path} is claimed by {len(found)} rows of precision.coverage.COVERAGE; it must be one.")
    return found[0]


def coverage_table() -> str:
    """The table in Markdown."""
    lines = ["| part | parameters | FP8 | arithmetic |", "|---|---|---|---|"]
    for row in COVERAGE:
        names = ", ".join(f"`{name}`" for name in row.weights) or "none"
        lines.append(f"| {row.part} | {names} | {'yes' if row.is_fp8 else 'no'} | {row.arithmetic} |")
    return "\n".join(lines)
