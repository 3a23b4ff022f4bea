"""The costs of the kernels as a Markdown table, in a page between two marks."""

from collections.abc import Iterable

from dsv3_kernels.aot.judge import Cost

BEGIN = "<!-- The table up to the next mark is written by `make test-aot ARGS=--write`. -->"
END = "<!-- End of the table of compiled kernels. -->"

# Columns of the loop: the opcodes that are counted together. LD and ST are LDG and STG by a generic address.
LOOP_COLUMNS = {
    "MMA": ("QGMMA", "HGMMA"),
    "FFMA": ("FFMA", "FFMA2"),
    "FMUL": ("FMUL", "FMUL2"),
    "MUFU": ("MUFU",),
    "F2FP": ("F2FP",),
    "SHFL": ("SHFL",),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS", "STSM"),
    "LDG": ("LDG", "LD"),
    "STG": ("STG", "ST"),
    "BAR": ("BAR",),
    "SYNCS": ("SYNCS",),
}
KERNEL_COLUMNS = {"UTMALDG": ("UTMALDG",), "UTMASTG": ("UTMASTG", "UTMAREDG")}
HEADER = [
    "case", "registers", "spilled B", "shared B", "loop", *LOOP_COLUMNS, *(f"{name} in all" for name in KERNEL_COLUMNS)
]  # fmt: skip


def table(costs: Iterable[tuple[str, Cost]]) -> str:
    """One row a case; `loop` is how many instructions the inner loop has. Without one, all instructions are counted."""
    rows: list[list[str | int]] = [[*HEADER], ["---", *["---:"] * (len(HEADER) - 1)]]
    for name, cost in costs:
        counted = cost.kernel if cost.loop is None else cost.loop
        loop = "none" if cost.loop is None else cost.loop.total()
        counts = [_sum(counted, opcodes) for opcodes in LOOP_COLUMNS.values()]
        whole = [_sum(cost.kernel, opcodes) for opcodes in KERNEL_COLUMNS.values()]
        rows.append([name, cost.registers, cost.spill_bytes, cost.shared_bytes, loop, *counts, *whole])
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def insert(page: str, table: str) -> str:
    """The page with the table between the marks, which are appended where they are missing."""
    if BEGIN not in page or END not in page:
        return f"{page.rstrip()}\n\n{BEGIN}\n{table}\n{END}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def differences(page: str, table: str) -> list[str]:
    """In what the page's table has other columns or other cases than `table`; numbers may differ."""
    if BEGIN not in page or END not in page:
        return ["it has no table of compiled kernels"]
    written, actual = _structure(page.partition(BEGIN)[2].partition(END)[0]), _structure(table)
    if written[:1] != actual[:1]:
        return ["its table has other columns"]
    return [
        *(f"its table lacks {name}" for name in actual[1:] if name not in written),
        *(f"its table has {name}, which is no case" for name in written[1:] if name not in actual),
    ]


def _structure(table: str) -> list[str]:
    """The header and the names of the cases."""
    lines = [line for line in table.strip().splitlines() if not line.startswith("| ---")]
    return [line if index == 0 else line.split("|")[1].strip() for index, line in enumerate(lines)]


def _sum(counts: dict[str, int], opcodes: tuple[str, ...]) -> int:
    return sum(counts.get(opcode, 0) for opcode in opcodes)
