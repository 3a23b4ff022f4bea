import os
import subprocess
import sys
from pathlib import Path

import pytest

START = "import sys, rich.console\nfrom dsv3_jax.output import dependable_output\ndependable_output()\n"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUTF8": "0"}


def test_characters_that_the_encoding_lacks_are_escaped(environment):
    code = START + "print('… \\udcff é'); rich.console.Console().rule('…'); print('…', file=sys.stderr)"
    for encoding, shown in (
        ("ascii", "\\u2026 \\udcff \\xe9"),
        ("latin-1", "\\u2026 \\udcff é"),
        ("utf-8", "… \\udcff é"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "PYTHONIOENCODING": encoding},
            capture_output=True,
            encoding=encoding,
            check=True,
        )
        assert done.stdout.splitlines()[0] == shown
        assert done.stderr.splitlines() == [shown.split()[0]]


def test_a_program_goes_on_when_nobody_reads_its_output(environment):
    code = (
        START + "for i in range(9): print(i); print(i, file=sys.stderr); rich.console.Console().print(i)\nsys.exit(7)"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    gone = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=write_end, stderr=write_end, check=False
    )
    os.close(write_end)
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code], env=environment, check=False
    )
    assert (gone.returncode, closed.returncode) == (7, 7)
