"""What made a run of a comparison, so that no command takes another's result for its own."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dsv3_kernels
from dsv3_jax.config.check import UserError
from dsv3_jax.config.stored import complete
from dsv3_jax.training.run import differences

MADE_BY = "made_by.json"


def describe_source(config: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """All that decides the losses of a run but its data: configuration (as `to_dict` gives it), code, and `rest`."""
    return {"config": config, "code": code_digest(), **rest}


def code_digest() -> str:
    """A hash of every Python file of the two packages, committed or not."""
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in (here, *(Path(folder) for folder in dsv3_kernels.__path__)):
        for file in sorted(package.rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def why_not(run_dir: Path, wanted: Mapping[str, Any], traces: Iterable[str]) -> str | None:
    """Why the run in `run_dir` is not what `wanted` would make; None if it is, or if none of `traces` lies there."""
    path = run_dir / MADE_BY
    try:
        found = json.loads(path.read_bytes())
        old = complete(found["config"], where=str(path))
    except FileNotFoundError:
        return f"has no {MADE_BY}" if any((run_dir / name).exists() for name in traces) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MADE_BY} is damaged ({error})"
    changes = [str(change) for change in differences(old, wanted["config"])[0]]
    changes += [
        f"{key}: {found.get(key)} -> {wanted[key]}"
        for key in wanted
        if key != "config" and found.get(key) != wanted[key]
    ]
    return "; ".join(changes) or None


def read_data(run_dir: Path) -> Any:
    """The digests of the data that the run has learned from."""
    return json.loads((run_dir / MADE_BY).read_bytes()).get("data")


def record(run_dir: Path, made_by: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Writes down what makes the run in `run_dir`, before its first step.

    Raises:
        UserError: it cannot be written.
    """
    path = run_dir / MADE_BY
    try:
        path.write_text(json.dumps({**made_by, "data": data}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room or choose another --out.") from error
