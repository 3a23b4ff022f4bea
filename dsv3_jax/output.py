"""Standard output and standard error, which never end a program."""

import io
import os
import sys


def dependable_output() -> None:
    """Lets a program go on whatever becomes of the place it prints to; call it before the first line is printed.

    A character that the terminal's encoding lacks is written as its escape. What cannot be written (the reader of a
    pipe has gone, the terminal is closed, the disk is full) is dropped. Lines appear as they are printed, in a pipe
    too. Streams that something else has put in place of the process's own stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's lifetime
        elif stream is own and isinstance(stream, io.TextIOWrapper):
            outlet = io.BufferedWriter(_Outlet(stream.fileno(), "w", closefd=False))
            encoding, errors = stream.encoding, "backslashreplace"
            setattr(sys, name, io.TextIOWrapper(outlet, encoding=encoding, errors=errors, line_buffering=True))


def warn(text: str) -> None:
    """One line on standard error: the program goes on, but the user should know."""
    print(f"warning: {text}", file=sys.stderr)


class _Outlet(io.FileIO):
    """A file descriptor that drops what it cannot pass on."""

    def write(self, data, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)
