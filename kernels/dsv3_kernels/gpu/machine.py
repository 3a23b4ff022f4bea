"""The GPU of this process, if there is one, and what a result must record of where it was measured."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

PACKAGE = Path(__file__).parents[1]


def prepare(xla_flags: str) -> None:
    """Adds flags for XLA; to be called before the first array exists.

    Memory is taken as it is needed, not three quarters at once: a process beside ours, torch's, wants some, too.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()


def gpu() -> Any | None:
    """The first GPU that jax runs on, or None."""
    device = jax.devices()[0]
    return device if device.platform == "gpu" else None


def no_gpu(command: str = "make gpu") -> str:
    """What a program prints where there is none, and which command to give where there is one."""
    return (
        f"No GPU here (jax {jax.__version__} runs on {jax.devices()[0].platform}): nothing was run. "
        f'On a machine with an NVIDIA GPU: pip install "jax[cuda13]", then {command}.'
    )


def describe() -> dict[str, Any]:
    """Device, versions, commit."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": getattr(device.client, "platform_version", "unknown").replace("\n", " "),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "commit": _commit(),
    }


def source_digest(modules: Iterable[str] = ()) -> str:
    """What distinguishes these sources from any others, committed or not: a digest of the package and more modules."""
    specs = [importlib.util.find_spec(name) for name in modules]
    files = [*sorted(PACKAGE.rglob("*.py")), *sorted(PACKAGE.rglob("*.json"))]
    files += [Path(spec.origin) for spec in specs if spec and spec.origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def version_of(package: str) -> str:
    """Of what may be installed or not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def results_folder() -> Path:
    """`kernels/results` of a checkout; of an installed package, `results` where the user is."""
    return PACKAGE.parent / "results" if (PACKAGE.parent / "results").is_dir() else Path("results")


def file_stem(device: str) -> str:
    """A file name for a device: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def _commit() -> str:
    """Short hash of the source's commit, with "+" when files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"
    except FileNotFoundError:  # no git on this machine
        return "unknown"
