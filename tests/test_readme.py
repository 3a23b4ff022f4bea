"""Every fenced block of every README, and of pages beside it, runs as if a reader typed it from top to bottom.

- ```python``` blocks of one page share one namespace, in order. A block whose first line is a comment naming a file
  (`# my_router.py`) is also written to that file, for the commands below it.
- ```sh``` blocks: every line is a command and runs in this process, with status 0. Of `CHECKED` ones only program and
  flags are checked, in fast tests of `SLOW` ones, too; of `make` the target, of `pip` the extra. `SHORTER` adds what
  makes a command short.
- What asks `SERVER` asks a server on `runs/tiny`, as `make serve` starts it; in fast tests only its syntax is checked.
- ```text``` and ```mermaid``` blocks are pictures; there is no other kind.

All happens in an empty folder in which the paths that examples name exist: the sources, `path/to/folder` (a little
text), `runs/tiny` and `DeepSeek-V3` (a small run, a small official folder), `tokenizer.json`, and `configs/`, where the
two files that are trained here, `tiny.py` and `bench_30m.py`, are the midget of `tests/training`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.interop.save import save_pretrained
from tests.small import make_config, make_variables

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "dsv3_jax", "kernels", "tests")
FOUND = [ROOT / "README.md", *(found for top in FOLDERS for found in sorted((ROOT / top).rglob("*.md")))]
READMES = {path.relative_to(ROOT).as_posix(): path for path in FOUND}
FENCED = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

# Where clients find the server that `make serve` starts.
SERVER = "127.0.0.1:8000"
SECONDS_TO_START = 600

# Commands of which only the flags are checked, and why. The key is a part of the line.
CHECKED = {
    "-m dsv3_kernels.check": "needs a GPU",
    "-m dsv3_kernels.bench": "needs a GPU",
    "-m dsv3_kernels.tuning": "needs a GPU, or writes into the repository (--model)",
    "-m dsv3_jax.planning.aot ": "compiles for minutes",
    "--peer": "needs transformers under another Python",
    "--run-dir runs/lite": "needs GPUs, or several processes",
    "-m dsv3_jax.bench.hostile": "runs for minutes",
    "-m dsv3_jax.bench.parity": "needs a process of its own, for its number of devices",
    "serve.py --model exported --port": "serves until it is stopped",
    "serve.py --model exported --host": "serves until it is stopped",
}
# What makes a command short.
SHORTER = {
    "--simulate-devices 4": "--set train.batch.micro=4 train.batch.start=4",
    "python train.py": "--set train.total_tokens=128 data.heldout_fraction=0.2",
    "-m dsv3_jax.bench.train": "--rounds 1 --set model.moe.num_groups=1 model.moe.groups_per_token=1",
    "-m dsv3_jax.bench.precision": "--steps 2 --seeds 0 --arms bf16 --set data.paths=path/to/folder",
    "--prompt ": "--max-new-tokens 4",
}
# What takes more than a few seconds even so.
SLOW = (
    SERVER,
    "precision=fp8_dsv3",
    "-m dsv3_jax.bench",
    "-m dsv3_jax.planning",
    "--config my_",
    "--run-dir runs/mesh",
)


class Block(NamedTuple):
    """A fenced block, and the line it begins at."""

    language: str
    code: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(m[2], m[3], text.count("\n", 0, m.start()) + 1) for m in FENCED.finditer(text)]


def commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


ALL_COMMANDS = [
    (name, command)
    for name, path in READMES.items()
    for block in blocks(path)
    if block.language == "sh"
    for command in commands(block.code)
]
WITH_SLOW = sorted({name for name, command in ALL_COMMANDS if any(part in command for part in SLOW)})


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_quickly: None) -> Path:
    """A folder with what the examples name, which is the current one."""
    for name in ("train.py", "serve.py", "dsv3_jax", "kernels", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").mkdir()
    for file in (ROOT / "configs").glob("*.py"):
        (tmp_path / "configs" / file.name).symlink_to(file)
    for name in ("tiny.py", "bench_30m.py"):
        (tmp_path / "configs" / name).unlink()
        (tmp_path / "configs" / name).write_text("from tests.training.midget import get_config\n")
    text = tmp_path / "path" / "to" / "folder"
    text.mkdir(parents=True)
    for number in range(6):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x * {number}\n" * 40)
    shutil.copytree(ROOT / "tests" / "golden" / "run_0_1", tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def official(typed: Path) -> None:
    """A small model in the official format, and a tokenizer that fits it."""
    texts = (file.read_text() for file in sorted((typed / "path" / "to" / "folder").iterdir()))
    (typed / "tokenizer.json").write_text(tokenizers.train(texts, vocab_size=300).to_json())
    cfg = make_config(vocab_size=300)
    save_pretrained(typed / "DeepSeek-V3", cfg, make_variables(cfg), "bfloat16", tokenizer=typed / "tokenizer.json")


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("name", READMES)
def test_blocks_run(name: str) -> None:
    run(READMES[name], only_checked=(*CHECKED, *SLOW))


@pytest.mark.slow
@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("name", WITH_SLOW)
def test_blocks_run_with_the_slow_ones(name: str) -> None:
    run(READMES[name], only_checked=(*CHECKED,))


def run(readme: Path, *, only_checked: tuple[str, ...]) -> None:
    """Runs the blocks of a README; of commands that contain one of `only_checked`, the flags are checked."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    with contextlib.ExitStack() as stack:
        address = None
        for block in blocks(readme):
            code, is_run = block.code, True
            if SERVER in code:
                is_run = SERVER not in only_checked
                address = address or (stack.enter_context(server()) if is_run else SERVER)
                code = code.replace(SERVER, address)
            if block.language == "python":
                named = re.match(r"# (\w+\.py)\b", code)
                if named:
                    Path(named[1]).write_text(code)
                compiled = compile("\n" * block.line + code, str(readme), "exec")
                if is_run:
                    exec(compiled, namespace)
            elif block.language == "sh":
                for command in commands(code):
                    run_command(command, is_run=not any(part in command for part in only_checked))


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server on the model that `make serve` serves; SIGTERM ends it, with status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "serve.py", "--model", "runs/tiny", "--port", address.partition(":")[2]]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}) as process:
        try:
            end = time.monotonic() + SECONDS_TO_START
            while not is_ready(address):
                assert process.poll() is None, "the server ended before it was ready"
                assert time.monotonic() < end, "the server was not ready in time"
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
        assert process.wait() == 0


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def run_command(command: str, *, is_run: bool) -> None:
    """Runs one line of a shell in this process, or checks that its program has its flags."""
    added = " ".join(more for part, more in SHORTER.items() if part in command)
    program, *arguments = shlex.split(command, comments=True) + shlex.split(added)
    while "=" in program:
        program, *arguments = arguments  # PYTHONPATH=kernels: the tests' path has it
    if program == "make":
        check_make(arguments)
    elif program == "python" and arguments[0] == "-c":
        exec(arguments[1], {})
    elif program == "python":
        main, arguments = entry(arguments)
        if is_run:
            assert main(arguments) == 0, command
        else:
            check_flags(main, arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "curl":
        run_curl(arguments, is_run=is_run)
    else:
        assert program == "export", f"{command}: teach tests/test_readme.py to run this, or mark the block as text"


def entry(arguments: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    """The function that the interpreter with these arguments runs, and its arguments."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
        return importlib.import_module(Path(arguments[0]).stem).main, arguments[1:]
    module = importlib.import_module(arguments[1])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{arguments[1]}.__main__")
    return module.main, arguments[2:]


def check_flags(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Runs a program until it has understood its command line."""

    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise Understood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        with pytest.raises(Understood):
            main(arguments)


def check_make(arguments: list[str]) -> None:
    """The Makefile has the target and reads the variables."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        variable, is_variable, _ = argument.partition("=")
        pattern = rf"\$\({variable}\)" if is_variable else rf"^{argument}:.*## "
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {argument}"


def run_curl(arguments: list[str], *, is_run: bool) -> None:
    """Its body is JSON; where it runs, and there is a curl, the answer is a good one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-H", action="append")
    parser.add_argument("-d", type=json.loads)
    parser.parse_args(arguments)
    curl = shutil.which("curl")
    if is_run and curl:
        subprocess.run([curl, "--silent", "--show-error", "--fail", *arguments], check=True)


def check_pip(arguments: list[str]) -> None:
    """The project has the extra that would be installed."""
    extra = re.fullmatch(r"install -e \.\[(\w+)\]", " ".join(arguments))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra, arguments
    assert extra[1] in project["optional-dependencies"]


def test_every_block_says_what_it_is() -> None:
    for name, path in READMES.items():
        fences = re.findall(r"^ *```", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(path)), f"{name}: a fence is not closed"
        kinds = {block.language for block in blocks(path)}
        assert kinds <= {"python", "sh", "text", "mermaid"}, f"{name}: {kinds}"


def test_no_exception_outlives_its_command() -> None:
    for part in (*CHECKED, *SHORTER, *SLOW):
        assert any(part in command for _, command in ALL_COMMANDS), f"no README has {part!r}"


def test_folders_and_programs_that_are_named_exist() -> None:
    for name, path in READMES.items():
        text = path.read_text(encoding="utf-8")
        for named in re.findall(r"`((?:dsv3_jax|configs|kernels|launch|tests)/[\w/.]*)`", text):
            assert (ROOT / named).exists(), f"{name} names {named}"
        for module in re.findall(r"`python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module), f"{name} names {module}"
