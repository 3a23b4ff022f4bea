"""The package by itself: what it imports, and the example of its README."""

import ast
import re
import sys
from pathlib import Path

import jax

from dsv3_kernels import dispatch

KERNELS = Path(__file__).parents[2] / "kernels"
ALLOWED = {"jax", "jaxlib", "ml_dtypes", "numpy", "jaxtyping", "dsv3_kernels", *sys.stdlib_module_names}


def test_it_needs_jax_numpy_ml_dtypes_and_jaxtyping_only():
    for path in KERNELS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= ALLOWED, path.name


def test_what_times_torch_needs_no_jax():
    for path in (KERNELS / "dsv3_kernels" / "gpu" / "torch_peer").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        foreign = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
        assert all(name.startswith("dsv3_kernels.gpu.torch_peer") for name in foreign), (path.name, foreign)


def test_the_examples_of_the_readme_run(capsys):
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    has_kernels = jax.__version_info__ >= dispatch.OLDEST_PALLAS_JAX
    assert capsys.readouterr().out.splitlines() == ["(300, 256)", str(has_kernels)]
