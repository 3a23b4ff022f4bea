"""What holds of the whole repository: imports point one way, files stay small, nothing machine-bound."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What each part may import of this project, besides itself.
ALLOWED = {
    "kernels/dsv3_kernels": [],
    "dsv3_jax/typing.py": [],
    "dsv3_jax/output.py": [],
    "dsv3_jax/progress.py": [],
    "dsv3_jax/interrupt.py": ["dsv3_jax.output"],
    "dsv3_jax/config": ["dsv3_jax.typing"],
    "dsv3_jax/precision": ["dsv3_jax.typing", "dsv3_kernels", "dsv3_jax.config"],
    "dsv3_jax/model": [
        "dsv3_jax.typing",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.precision",
        "dsv3_jax.parallel.axes",
    ],
    "dsv3_jax/flax.py": ["dsv3_jax.typing", "dsv3_jax.config", "dsv3_jax.model"],
    "dsv3_jax/parallel": ["dsv3_jax.typing", "dsv3_kernels", "dsv3_jax.config", "dsv3_jax.precision"],
    # a program
    "dsv3_jax/parallel/pipeline/show.py": ["dsv3_jax.typing", "dsv3_jax.interrupt", "dsv3_jax.config"],
    "dsv3_jax/data": ["dsv3_jax.typing", "dsv3_jax.interrupt", "dsv3_jax.progress", "dsv3_jax.config"],
    # convert quantises with dsv3_kernels.quantize; export reads a run's checkpoint.
    "dsv3_jax/interop": [
        "dsv3_jax.typing",
        "dsv3_jax.progress",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.model.params",
    ],
    # a model comes from a run's checkpoint or from an official folder.
    "dsv3_jax/interop/run_dir.py": [
        "dsv3_jax.typing",
        "dsv3_jax.config",
        "dsv3_jax.training.checkpoint",
    ],
    # what goes along with the weights is checked by the loader of tokenizers.
    "dsv3_jax/interop/hf_tokenizer.py": [
        "dsv3_jax.typing",
        "dsv3_jax.config",
        "dsv3_jax.data.tokenizer",
    ],
    "dsv3_jax/interop/export.py": [
        "dsv3_jax.typing",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.model.params",
        "dsv3_jax.output",
        "dsv3_jax.interrupt",
        "dsv3_jax.data",
        "dsv3_jax.training",
    ],
    "dsv3_jax/training": [
        "dsv3_jax.typing",
        "dsv3_jax.output",
        "dsv3_jax.interrupt",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.precision",
        "dsv3_jax.model",
        "dsv3_jax.parallel",
        "dsv3_jax.data",
        "dsv3_jax.interop",
        "dsv3_jax.planning",
    ],
    "dsv3_jax/serving": [
        "dsv3_jax.typing",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.precision",
        "dsv3_jax.model",
        "dsv3_jax.parallel",
        "dsv3_jax.data",
        "dsv3_jax.interop",
    ],
    # it ends when a signal comes.
    "dsv3_jax/serving/http/server.py": [
        "dsv3_jax.typing",
        "dsv3_jax.interrupt",
        "dsv3_jax.config",
    ],
    "dsv3_jax/planning": [
        "dsv3_jax.typing",
        "dsv3_kernels",
        "dsv3_jax.interrupt",
        "dsv3_jax.config",
        "dsv3_jax.precision",
        "dsv3_jax.model",
        "dsv3_jax.parallel",
        "dsv3_jax.interop.hf_names",
    ],
    # it compiles the step that train.py runs.
    "dsv3_jax/planning/aot_step.py": [
        "dsv3_jax.typing",
        "dsv3_jax.interrupt",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.data.batch",
        "dsv3_jax.training",
    ],
    # the same for a mesh.
    "dsv3_jax/planning/aot.py": [
        "dsv3_jax.typing",
        "dsv3_jax.interrupt",
        "dsv3_kernels",
        "dsv3_jax.config",
        "dsv3_jax.data.batch",
        "dsv3_jax.model",
        "dsv3_jax.parallel",
        "dsv3_jax.training",
    ],
    # which layers a stage has.
    "dsv3_jax/planning/ranks.py": [
        "dsv3_jax.typing",
        "dsv3_jax.config",
        "dsv3_jax.model",
        "dsv3_jax.parallel",
        "dsv3_jax.training.layout",
    ],
}
# Edges see everything.
EDGES = ("dsv3_jax/__init__.py", "dsv3_jax/bench")

PURE = [
    "dsv3_jax/typing.py",
    "dsv3_jax/config/check.py",
    "dsv3_jax/config/mesh_rules.py",
    "dsv3_jax/config/model.py",
    "dsv3_jax/config/parallel.py",
    "dsv3_jax/config/train.py",
    "dsv3_jax/config/run.py",
    "dsv3_jax/model",
    "dsv3_jax/precision",
    "dsv3_jax/parallel/axes.py",
    "dsv3_jax/parallel/mesh.py",
    "dsv3_jax/parallel/sharding.py",
    "dsv3_jax/interop/hf_names.py",
    "dsv3_jax/parallel/pipeline/placement.py",
    "dsv3_jax/parallel/pipeline/schedule.py",
    "dsv3_jax/parallel/pipeline/simulate.py",
    "dsv3_jax/training/loss.py",
    "dsv3_jax/training/optimizer.py",
    "dsv3_jax/training/schedules.py",
    "dsv3_jax/training/state.py",
    "dsv3_jax/training/step.py",
    "kernels/dsv3_kernels/quantize.py",
]
IMPURE_MODULES = {"os", "pathlib", "time", "logging", "json", "duckdb", "random", "subprocess", "socket"}


def _sources() -> list[Path]:
    """Every Python file of the project: what git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return sorted(ROOT / name for name in set(listed.stdout.splitlines()) if (ROOT / name).is_file())
    folders = ("dsv3_jax", "kernels", "configs", "tests")
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))])


SOURCES = _sources()
LIBRARY = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("dsv3_jax", "kernels")]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def _imports(path: Path) -> list[str]:
    """Dotted names that a file imports, `from a import b` as a.b; a relative import begins with a dot."""
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (f"{node.module}." if node.module else "")
            found += [origin + alias.name for alias in node.names]
    return found


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _import_roots(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {module.split(".")[0] for module in _imports(path)}


def _length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _assert_none(offenders: Iterable[str]) -> None:
    """Fails with all offenders, one a line."""
    found = list(offenders)
    assert not found, "\n" + "\n".join(found)


def test_imports_are_absolute() -> None:
    _assert_none(
        f"{_name(path)} imports {module}; write the full name"
        for path in SOURCES
        for module in _imports(path)
        if module.startswith(".")
    )


def test_imports_point_one_way() -> None:
    def offenders() -> Iterator[str]:
        for path in LIBRARY:
            name = _name(path)
            if name.startswith(EDGES):
                continue
            parts = [part for part in ALLOWED if name == part or name.startswith(part + "/")]
            if not parts:
                yield f"{name} lies in no part that ALLOWED knows"
                continue
            part = max(parts, key=len)
            own = "dsv3_kernels" if part.startswith("kernels") else ".".join(Path(name).parts[:2])
            allowed = [*ALLOWED[part], own]
            ours = [module for module in _imports(path) if module.split(".")[0] in ("dsv3_jax", "dsv3_kernels")]
            wrong = [module for module in ours if not any(_is_within(module, package) for package in allowed)]
            if wrong:
                yield f"{name} may import {allowed}, not {wrong}"

    _assert_none(offenders())


def test_pure_parts_touch_no_files_and_no_clock() -> None:
    def offenders() -> Iterator[str]:
        for part in PURE:
            paths = [path for path in LIBRARY if _name(path) == part or _name(path).startswith(part + "/")]
            if not paths:
                yield f"{part} does not exist; correct PURE"
            wrong = {_name(path): sorted(IMPURE_MODULES & _import_roots(path)) for path in paths}
            yield from (f"{name} is pure but imports {modules}" for name, modules in wrong.items() if modules)

    _assert_none(offenders())


def test_files_are_small() -> None:
    lengths = {_name(path): _length(path) for path in SOURCES}
    _assert_none(f"{name} has {length} lines; split it by idea" for name, length in lengths.items() if length >= 500)


def test_the_model_is_small() -> None:
    """The parameter tree, the equations and what joins them."""
    lengths = {path: _length(path) for path in LIBRARY if _name(path).startswith("dsv3_jax/model/")}
    assert sum(lengths.values()) < 1150, f"dsv3_jax/model has {sum(lengths.values())} lines of Python"


def test_the_forward_pass_is_read_in_one_sitting() -> None:
    """What `forward` imports, directly or not, of the model and of the plain precision."""
    parts = ("dsv3_jax/model/", "dsv3_jax/precision/plain_linear.py")
    modules = {_name(path)[:-3].replace("/", "."): path for path in LIBRARY if _name(path).startswith(parts)}
    found, left = set(), [modules["dsv3_jax.model.transformer"]]
    while left:
        path = left.pop()
        found.add(path)
        named = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in _imports(path)}
        left += [path for path in named - found if path is not None]
    lines = {_name(path): _length(path) for path in sorted(found)}
    assert len(lines) <= 12, f"forward needs {len(lines)} files: {', '.join(lines)}"
    assert sum(lines.values()) < 1100, f"forward needs {sum(lines.values())} lines: {lines}"


def test_functions_of_the_core_are_short() -> None:
    """Docstrings do not count, decorators and signatures do."""
    core = ("dsv3_jax/model/", "dsv3_jax/serving/", "dsv3_jax/training/step.py", "dsv3_jax/flax.py")

    def offenders() -> Iterator[str]:
        for path in LIBRARY:
            for node in ast.walk(_tree(path)) if _name(path).startswith(core) else ():
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                    docstring = len(str(ast.get_docstring(node)).splitlines()) if ast.get_docstring(node) else 0
                    length = (node.end_lineno or first) - first + 1 - docstring
                    if length > 40:
                        yield f"{_name(path)}: {node.name} has {length} lines; name its parts"

    _assert_none(offenders())


def test_files_say_what_they_are() -> None:
    _assert_none(
        f"{_name(path)} has no docstring"
        for path in SOURCES
        if not _name(path).startswith("tests/") and path.stat().st_size and not ast.get_docstring(_tree(path))
    )


def test_files_are_finished() -> None:
    marks = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + "X|HA" + r"CK)\b")
    stub = re.compile(r"^\s*\.\.\.\s*$", re.MULTILINE)

    def offenders() -> Iterator[str]:
        for path in SOURCES:
            text = path.read_text(encoding="utf-8")
            if marks.search(text):
                yield f"{_name(path)} has an unfinished mark"
            if stub.search(text) and "Protocol" not in text:
                yield f"{_name(path)} has a stub"

    _assert_none(offenders())


def test_only_the_parameter_tree_spells_the_path_of_a_router_bias() -> None:
    spelt = re.compile(r"""["']router["']\W+["']bias["']""")
    _assert_none(
        f"{_name(path)} spells the path of a router bias; call dsv3_jax.model.moe.router"
        for path in LIBRARY
        if path.name not in ("router.py", "tree.py", "flax.py") and spelt.search(path.read_text(encoding="utf-8"))
    )


def test_no_pickle() -> None:
    pickles = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    _assert_none(
        f"{_name(path)} imports {pickles & _import_roots(path)}" for path in SOURCES if pickles & _import_roots(path)
    )


def test_no_machine_paths() -> None:
    text_suffixes = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ""}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() if listed.returncode == 0 else [_name(path) for path in SOURCES]
    machine = re.compile(r"(?<![\w.$}])/(home|Users|work|root|opt|mnt|scratch)/[A-Za-z0-9]")

    def offenders() -> Iterator[str]:
        for name in names:
            path = ROOT / name
            if path.suffix in text_suffixes and path.is_file() and path != Path(__file__):
                found = machine.search(path.read_text(encoding="utf-8", errors="replace"))  # a stored run is binary
                if found:
                    yield f"{name} names a path of one machine: {found.group()}"

    _assert_none(offenders())


def test_constraints_name_no_index() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--" not in text


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_grab_bag_files() -> None:
    assert not [_name(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_declared_dependencies_are_those_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {_module(line) for line in project["dependencies"]}
    allowed = {*sys.stdlib_module_names, "dsv3_jax", "dsv3_kernels"}
    runtime = [path for path in SOURCES if not _name(path).startswith("tests/")]
    imported = {module.split(".")[0] for path in runtime for module in _imports(path)} - allowed
    assert imported == declared
    developing = {_module(line) for line in project["optional-dependencies"]["dev"]}
    in_tests = {m.split(".")[0] for path in SOURCES if _name(path).startswith("tests/") for m in _imports(path)}
    assert in_tests <= allowed | declared | developing | {"train", "serve", "tests"}


def _module(requirement: str) -> str:
    """The import name of a requirement."""
    name = re.split(r"[<>=;\[ ]", requirement)[0]
    return {"orbax-checkpoint": "orbax", "prometheus-client": "prometheus_client"}.get(name, name)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, dsv3_jax; print(sorted({'jax', 'flax', 'numpy', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
