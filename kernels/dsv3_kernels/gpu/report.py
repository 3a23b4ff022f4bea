"""The measured rows as a table for a reader and as data: rates, shares of the ceilings, ratios to the others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from dsv3_kernels.gpu.case import BenchCase
from dsv3_kernels.gpu.ceilings import Ceilings


class Row(NamedTuple):
    """What one case gave; seconds of one launch, None where something did not run, with the reason in `notes`."""

    case: BenchCase
    kernel: float | None
    others: Mapping[str, float | None]
    notes: tuple[str, ...] = ()
    spread: tuple[float, float] | None = None
    """Fastest and slowest launch of the kernel."""
    ways: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    """Of another way that was the fastest of several, by its name: seconds of each."""
    kernels: tuple[float, ...] = ()
    """Seconds of each kernel that the launch consists of, where they are known."""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long each other way takes: above 1 the kernel is faster."""
        if self.kernel is None:
            return {}
        return {name: seconds / self.kernel for name, seconds in self.others.items() if seconds is not None}

    @property
    def fastest(self) -> dict[str, str]:
        """Which of several ways it was."""
        return {name: min(ways, key=ways.__getitem__) for name, ways in self.ways.items()}


LAUNCH = 3e-6
"""Seconds of a launch in which no bytes move, and that no kernel can hide. DeepGEMM's published times at M = 64 and 128
are their bytes at 2.9 TB/s, taken for an H800's, and 1 to 5 µs; at 64 x 2112 x 7168 some 4 of 9 µs."""


def goal_seconds(case: BenchCase, ceilings: Ceilings) -> float:
    """What a launch should take at most.

    Bound by memory: the bytes at the measured copy rate, and 3 µs for each launch. Bound by matmuls: the share that is
    the case's goal of their measured rate, else the published rate, else all of the measured one.
    """
    memory, compute = ceilings.bounds(case.flops, case.num_bytes, is_bf16=case.is_bf16)
    if memory > compute:
        return memory + LAUNCH * case.num_launches
    if case.goal_share is None and case.published and case.published.tflops:
        return case.flops / (case.published.tflops * 1e12)
    return compute / (case.goal_share or 1.0)


def as_data(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    """The row for JSON: microseconds, TFLOPS, GB/s, shares and ratios."""
    case = row.case
    data: dict[str, Any] = {
        "op": case.op,
        "name": case.name,
        "flops": case.flops,
        "bytes": case.num_bytes,
        "kernel_us": _microseconds(row.kernel),
        "other_us": {name: _microseconds(seconds) for name, seconds in row.others.items()},
        "times_faster": {name: round(ratio, 3) for name, ratio in row.ratios.items()},
        "fastest_way": row.fastest,
        "way_us": {name: {way: _microseconds(ways[way]) for way in ways} for name, ways in row.ways.items()},
        "published": case.published._asdict() if case.published else None,
        "goal_us": _microseconds(goal_seconds(case, ceilings)),
        "seconds": {name: getattr(row, name) for name in ("kernel", "others", "notes", "spread", "kernels")},
        "kernels_us": [_microseconds(seconds) for seconds in row.kernels],
        "notes": list(row.notes),
    }
    if row.spread:
        data["kernel_us_range"] = [_microseconds(seconds) for seconds in row.spread]
    if row.kernel is not None:
        share, bound = ceilings.share(row.kernel, case.flops, case.num_bytes, is_bf16=case.is_bf16)
        data |= {
            "tflops": round(case.flops / row.kernel / 1e12, 1),
            "gbps": round(case.num_bytes / row.kernel / 1e9, 1),
            "share_of_ceiling": round(share, 3),
            "ceiling": bound,
            "share_of_goal": round(goal_seconds(case, ceilings) / row.kernel, 3),
        }
    return data


def markdown(machine: Mapping[str, Any], ceilings: Ceilings, rows: Sequence[Row]) -> str:
    """The page of one machine: what it is, its ceilings, a table an op."""
    lines = [f"# {machine['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if name != "device"]
    lines += [
        f"- ceilings measured in this run: copy {ceilings.copy_bytes / 1e9:.0f} GB/s, matmul of large matrices "
        f"{ceilings.bf16_flops / 1e12:.0f} TFLOPS in bf16, {ceilings.fp8_flops / 1e12:.0f} in FP8 without scales",
        "",
        "`µs`: all that a call launches; `alone`: the longest of its kernels, of so many. `goal`: bound by memory, the "
        f"bytes at the copy rate and {LAUNCH * 1e6:.0f} µs a launch; bound by matmuls, a share of their rate that the "
        "case sets, else the published rate, else all of theirs; `of goal`: it by the time taken, 100% reaches it. "
        "`of ceiling`: time that the bytes need at the copy rate or the matmuls at the FP8 rate (bf16 matmuls: at "
        "theirs), whichever is longer (m, c), by the time taken. `×`: how many times as long the other way takes; "
        "above 1 the kernel is faster. In brackets which of torch's ways it is, the fastest of those tried.",
    ]
    for op in dict.fromkeys(row.case.op for row in rows):
        lines += ["", *_table(op, [row for row in rows if row.case.op == op], ceilings)]
    return "\n".join(lines) + "\n"


def _table(op: str, rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    others = list(dict.fromkeys(name for row in rows for name in row.others))
    head = [
        "case",
        "µs",
        "alone",
        "goal",
        "of goal",
        "TFLOPS",
        "GB/s",
        "of ceiling",
        "published",
        *(f"× {name}" for name in others),
        "note",
    ]
    lines = [f"## {op}", "", _line(head), _line(["---", *["---:"] * (len(head) - 2), "---"])]
    marks = _marks(rows)
    for row in rows:
        case = row.case
        goal = goal_seconds(case, ceilings)
        cells = [case.name, "not measured", "", f"{goal * 1e6:.1f}", "", "", "", ""]
        if row.kernel is not None:
            share, bound = ceilings.share(row.kernel, case.flops, case.num_bytes, is_bf16=case.is_bf16)
            cells = [
                case.name,
                f"{row.kernel * 1e6:.1f}",
                f"{max(row.kernels) * 1e6:.1f} of {len(row.kernels)}" if row.kernels else "",
                f"{goal * 1e6:.1f}",
                f"{goal / row.kernel:.0%}",
                f"{case.flops / row.kernel / 1e12:.0f}",
                f"{case.num_bytes / row.kernel / 1e9:.0f}",
                f"{share:.0%} {bound[0]}",
            ]
        compared = [_compared(row, name) for name in others]
        notes = "; ".join(marks.get(note, note) for note in row.notes)
        lines.append(_line([*cells, _published(case), *compared, notes]))
    return lines + ([""] if marks else []) + [f"- {mark} {note}" for note, mark in marks.items()]


def _marks(rows: Sequence[Row]) -> dict[str, str]:
    """(1), (2) ... for notes that several rows share; they are written once, below the table."""
    counts = Counter(note for row in rows for note in row.notes)
    return {note: f"({number})" for number, note in enumerate((n for n in counts if counts[n] > 1), start=1)}


def _compared(row: Row, name: str) -> str:
    """The cell of another way: its ratio, or its time where the kernel has none to compare with."""
    seconds = row.others.get(name)
    if seconds is None:
        return ""
    way = row.fastest.get(name)
    if name in row.ratios:
        return f"{row.ratios[name]:.2f}" + (f" ({way})" if way else "")
    return f"({seconds * 1e6:.1f} µs" + (f", {way})" if way else ")")


def _published(case: BenchCase) -> str:
    if case.published is None:
        return ""
    rates = [(case.published.tflops, "TFLOPS"), (case.published.gbps, "GB/s")]
    return f"{' '.join(f'{rate:.0f} {unit}' for rate, unit in rates if rate is not None)} ({case.published.source})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 2)
