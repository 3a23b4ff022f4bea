"""Measured values beside what they should be."""

import dataclasses
from typing import Any

import rich.table


@dataclasses.dataclass(frozen=True)
class Line:
    """One measurement."""

    what: str
    value: float
    unit: str
    goal: str = ""
    is_met: bool | None = None
    """None where there is no goal."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def at_least(what: str, value: float, goal: float, unit: str) -> Line:
    """A value that should be no lower than `goal`."""
    return Line(what, value, unit, f"≥ {goal:g} {unit}", value >= goal)


def at_most(what: str, value: float, goal: float, unit: str) -> Line:
    """A value that should be no higher than `goal`."""
    return Line(what, value, unit, f"≤ {goal:.3g} {unit}", value <= goal)


def table(title: str, lines: list[Line]) -> rich.table.Table:
    """One line a measurement, for a terminal."""
    shown = rich.table.Table(title=title)
    shown.add_column("what")
    shown.add_column("measured", justify="right", no_wrap=True)
    shown.add_column("goal", justify="right", no_wrap=True)
    shown.add_column("met")
    for line in lines:
        met = {None: "", True: "yes", False: "no"}[line.is_met]
        shown.add_row(line.what, f"{line.value:.4g} {line.unit}", line.goal, met)
    return shown
