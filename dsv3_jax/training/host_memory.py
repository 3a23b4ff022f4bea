"""How the C library hands memory back: not at all, for a process that needs the same gigabyte every step."""

import ctypes
import platform

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
"""Parameters of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> bool:
    """Lets freed memory stay with the process, so that a step on CPU finds its buffers already mapped.

    Call it before the first use of a device: later, threads have arenas of their own, which always map and unmap
    large buffers. The process never shrinks below its peak. Returns False, having done nothing, where the C library
    is not glibc. Why: `dsv3_jax/bench/README.md`.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
