"""The heap of this process: on huge pages and kept, where the allocator is glibc's.

A matrix that is read once a token is read through the pages of 4 KB that hold it, and in a virtual machine each of them
costs a walk through two tables. On pages of 2 MB weights come up to a fifth faster (docs/log.md, "Huge pages"). The
system gives them to who asks (madvise(2), MADV_HUGEPAGE), for memory that was not touched yet: so the heap is grown
first, without touching it, and what is allocated later falls there.

Elsewhere than on Linux with glibc, and where the system has no huge pages, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HUGE = 2 << 20  # bytes of a page, on x86 and on ARM with pages of 4 KB
_ADVICE = 14  # MADV_HUGEPAGE, of asm-generic/mman-common.h
_TRIM, _THRESHOLD, _MAPPED = -1, -3, -4  # mallopt's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX, of malloc.h
_NEVER = -1
# Of glibc: how many blocks are mapped beside the heap, and from which size at most. It learns that size from what is
# freed, but no longer where one of the three was set: then the first size, 128 KB, would stay.
_MOST, _LARGEST = 65536, 32 << 20
_KEPT = 256 << 20  # bytes at the heap's end that are not given back
_GROWTH, _ROOM = 1.5, 512 << 20  # how far a process may grow before what was freed is given back


def keep_heap() -> None:
    """Lets the allocator keep all that is freed, on huge pages, for the rest of the process.

    It gives tensors above 32 MB back to the system at once: each step then faults the same pages in anew, which took
    up to two thirds of a product's time (docs/log.md, "Freed memory").
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_MAPPED, 0)
        _reserve(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


@contextlib.contextmanager
def huge_pages(size: int) -> Iterator[None]:
    """What the main thread allocates meanwhile, up to `size` bytes, lies on huge pages; then the heap shrinks again.

    What is left of it is given back at once: activations that lie there later cost an AMD processor up to a third of
    its speed with prompts (docs/log.md, "Weights alone on huge pages").
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MAPPED, 0)  # else what is large is mapped, beside the heap
    _reserve(libc, size)
    try:
        yield
    finally:
        libc.mallopt(_TRIM, _KEPT)
        libc.mallopt(_THRESHOLD, _LARGEST)
        libc.mallopt(_MAPPED, _MOST)
        libc.malloc_trim(0)


class HeapLimit:
    """Gives back what was freed when the process holds far more than it did after the first step.

    Tensors of ever other sizes leave gaps that none of the next ones fits, so that what is kept grows without end.
    """

    def __init__(self) -> None:
        self._limit: float | None = None

    def check(self) -> bool:
        """Called after each step; whether memory was given back, whose pages are faulted in anew as they are used."""
        held = resident_bytes()
        if held is None or (self._limit is not None and held <= self._limit):
            return False
        given = self._limit is not None and (libc := _glibc()) is not None and bool(libc.malloc_trim(0))
        self._limit = _GROWTH * (resident_bytes() or held) + _ROOM
        return given


def resident_bytes() -> int | None:
    """Memory that the process holds now, None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not on macOS and Windows
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _reserve(libc: Any, size: int) -> None:
    """Grows the heap by `size` bytes, none of them touched, and asks for huge pages there."""
    libc.mallopt(_TRIM, _NEVER)  # else the heap shrinks again as the block is freed
    block = libc.malloc(size)
    if block is None:  # a limit on the address space
        return
    first, end = -(-block // _HUGE) * _HUGE, (block + size) // _HUGE * _HUGE
    if end > first:
        libc.madvise(first, end - first, _ADVICE)
    libc.free(block)


def _glibc() -> Any:
    """The C library, None where it is another."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "madvise")):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
