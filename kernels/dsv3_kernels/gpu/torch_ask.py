"""torch's times beside ours in the rows: the question to its process (`torch_peer`) and what is made of the answers."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.report import Row
from dsv3_kernels.gpu.timing import num_input_sets
from dsv3_kernels.gpu.torch_peer.problems import to_json

GRACE = 20
"""Seconds that the process has to end what it began in time."""

Answers = list[dict[str, Any]]
"""As `torch_peer/__main__.py` gives them."""


def with_torch(rows: Sequence[Row], ask: Callable[[dict[str, Any]], Answers], clock: str) -> tuple[list[Row], str]:
    """The rows with the fastest of torch's ways among the others, and its version or why there is none."""
    asked = [index for index, row in enumerate(rows) if row.case.torch and row.others]
    if not asked:
        return list(rows), "no row that it computes"
    problems = [
        {**to_json(problem), "sets": num_input_sets(rows[index].case.num_bytes)}
        for index in asked
        if (problem := rows[index].case.torch)
    ]
    answers = ask({"clock": clock, "rows": problems})
    result = list(rows)
    for position, index in enumerate(asked):
        result[index] = _with_answers(rows[index], [each for each in answers if each.get("row") == position])
    about = [each[word] for each in answers for word in ("version", "missing") if word in each]
    return result, "; ".join(about)


def run_peer(python: str, request: dict[str, Any], seconds: float) -> Answers:
    """What the process answered within the time; its death or an answer cut short costs what was still to come."""
    path = os.pathsep.join([str(machine.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [python, "-m", "dsv3_kernels.gpu.torch_peer"],
            input=json.dumps({**request, "seconds": seconds}).encode(),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            check=False,
            timeout=seconds + GRACE,
        )
    except OSError as error:
        return [{"missing": f"torch was not measured ({type(error).__name__})"}]
    except subprocess.TimeoutExpired as error:
        return [*_answers(error.stdout or b""), {"missing": f"stopped after {seconds + GRACE:.0f} s"}]
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return [*_answers(done.stdout), {"missing": f"torch's process failed ({why[0]})"}]
    return _answers(done.stdout)


def _with_answers(row: Row, answers: Answers) -> Row:
    """Its columns, the times of each way in them, and one note for ways that were refused for the same reason."""
    ways: dict[str, dict[str, float]] = {}
    refused: dict[str, list[str]] = {}
    for answer in answers:
        if "seconds" in answer:
            ways.setdefault(answer["column"], {})[answer["way"]] = answer["seconds"]
        else:
            refused.setdefault(answer["refused"], []).append(answer["way"])
    columns = dict.fromkeys(answer["column"] for answer in answers)
    fastest = {column: min(ways[column].values()) if column in ways else None for column in columns}
    notes = tuple(f"torch {', '.join(names)}: {why}" for why, names in refused.items())
    return row._replace(others={**row.others, **fastest}, ways=ways, notes=row.notes + notes)


def _answers(output: bytes) -> Answers:
    """The whole lines that are JSON objects; libraries may print others."""
    answers = []
    for line in output.decode(errors="replace").splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict):
            answers.append(answer)
    return answers
