"""The heap of the process: what lies on huge pages, what is kept when it is freed."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from llmcli.data import heap

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE = 64 << 20

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another")
madvised = pytest.mark.skipif(
    not _ENABLED.is_file() or "[madvise]" not in _ENABLED.read_text(), reason="huge pages are not to be asked for"
)


def _found(ask: Callable[[Any], None]) -> Any:
    """What `ask` puts, in a process of its own: the allocator's settings last as long as it does."""
    context = forked.server()
    found = context.Queue()
    child = context.Process(target=ask, args=(found,))
    child.start()
    answer = found.get(timeout=60)
    child.join()
    return answer


def _heap_kb(fact: str) -> int:
    """A fact of the heap's mappings: Rss, AnonHugePages, in KB (proc_pid_smaps(5))."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith("[heap]")
        elif inside and line.startswith(f"{fact}:"):
            total += int(line.split()[1])
    return total


def _block() -> bytearray:
    """Memory of the C library's own allocator (numpy asks for huge pages itself), touched once."""
    block = bytearray(_SIZE)
    block[:: 1 << 12] = b"x" * (_SIZE >> 12)
    return block


@glibc
def test_freed_memory_stays_with_the_process() -> None:
    before, after = _found(_faults)
    assert after < before / 4


def _faults(found: Any) -> None:
    """Pages faulted in by 3 tensors of 64 MB, one after the other, before and after freed memory is kept."""
    counts = []
    for keep in (False, True):
        if keep:
            heap.keep_heap()
            np.ones(16 << 20, np.float32)  # faulted in once more, and kept
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            np.ones(16 << 20, np.float32)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
    found.put(counts)


@glibc
@madvised
def test_what_is_allocated_meanwhile_lies_on_huge_pages() -> None:
    before, untouched, after, later = _found(_on_huge_pages)
    assert untouched - before < 4 << 10  # KB: the reserve itself takes no memory
    assert after - before > 0.5 * (_SIZE >> 10)  # all of it, but where the system finds no whole page free
    assert later - after < 0.5 * (_SIZE >> 10)  # what comes later, and is large, lies beside the heap again


def _on_huge_pages(found: Any) -> None:
    answer = [_heap_kb("AnonHugePages")]
    with heap.huge_pages(_SIZE + (8 << 20)):
        answer.append(_heap_kb("AnonHugePages"))
        inside = _block()
        answer.append(_heap_kb("AnonHugePages"))
    outside = _block()
    answer.append(_heap_kb("AnonHugePages"))
    found.put(answer)
    del inside, outside


@glibc
@madvised
def test_what_is_left_of_it_is_given_back() -> None:
    before, after = _found(_beside_huge_pages)
    assert after - before < 8 << 10


def _beside_huge_pages(found: Any) -> None:
    before = _heap_kb("AnonHugePages")
    with heap.huge_pages(_SIZE):
        pass
    small = [bytearray(b"x") * (100 << 10) for _ in range(400)]  # they lie in the heap, and not beside it
    found.put((before, _heap_kb("AnonHugePages")))
    del small


@glibc
def test_what_was_opened_and_closed_is_given_back() -> None:
    before, held, after = _found(_opened_and_closed)
    assert held - before > 500 << 20
    assert after - before < 300 << 20


def _opened_and_closed(found: Any) -> None:
    before = heap.resident_bytes()
    with heap.huge_pages(640 << 20):
        blocks = [_block() for _ in range(8)]
    held = heap.resident_bytes()
    blocks.clear()
    found.put((before, held, heap.resident_bytes()))


@glibc
def test_a_limit_on_memory_is_no_error() -> None:
    assert _found(_limited) == "done"


def _limited(found: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    with heap.huge_pages(1 << 40):
        found.put("done")


@glibc
def test_memory_that_grew_by_gaps_is_given_back() -> None:
    held, grown, given, after = _found(_grown)
    assert given == [False, True, False]  # at first it only looks; at last there is no more to give
    assert grown - held > 768 << 20
    assert after - held < (grown - held) / 4


def _grown(found: Any) -> None:
    heap.keep_heap()
    limit, held = heap.HeapLimit(), heap.resident_bytes()
    given = [limit.check()]
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(1024)]
    last = blocks[-1]
    blocks.clear()  # `last` keeps the heap from shrinking
    grown = heap.resident_bytes()
    given += [limit.check(), limit.check()]
    found.put((held, grown, given, heap.resident_bytes()))
    del last


def test_another_system_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    heap.keep_heap()
    with heap.huge_pages(1 << 20):
        pass
