"""Partial files: the lines of a file that is not finished, kept beside its place, so that the work can go on there.

Invariant: `NAME.partial-KEY` holds whole lines of one work, which the key tells; a last line that a crash tore is cut
off before anything is added. The file itself appears once the work is finished, and then there is no partial one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmcli.errors import LlmcliError, UsageError, from_os_error
from llmcli.files.atomic import make_folders, refuse_existing, sync

_MARK = ".partial-"


class PartialFile:
    """Lines that stand already, to be compared with, and lines that are added. Made by `partial_file`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self.kept = 0  # lines that stand already
        if path.exists():
            self._open()

    def _open(self) -> BinaryIO:
        make_folders(self.path.parent)
        file = open(self.path, "a+b", buffering=1 << 20)  # noqa: SIM115 -- closed by close()
        self._file = file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LlmcliError("another process is writing this file", where=str(self.path)) from error
        length = 0
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break
            length += len(line)
            self.kept += 1
        file.truncate(length)
        return file

    def begins(self) -> Iterator[bytes]:
        """The lines that stand already, without holding more than one."""
        if self._file is not None:
            with open(self.path, "rb") as file:
                for _, line in zip(range(self.kept), file, strict=False):
                    yield line

    def write(self, line: bytes) -> None:
        """Adds a line, which ends with a newline."""
        (self._file or self._open()).write(line)

    def finish(self, target: Path) -> None:
        """Gives the file its final name."""
        file = self._file or self._open()
        file.flush()
        os.fsync(file.fileno())
        os.replace(self.path, target)
        sync(target.parent)

    def close(self) -> None:
        """Closes the file; what was not written yet is."""
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def partial_file(path: Path, key: str, *, overwrite: bool = False) -> Iterator[PartialFile]:
    """Yields what stands of `path`; when the body is done it becomes `path`, on any failure it is kept.

    `key` tells of what the lines are. Raises UsageError where lines of another work are kept, unless `overwrite` says
    to begin anew.
    """
    refuse_existing(path, overwrite=overwrite)
    place = path.with_name(f"{path.name}{_MARK}{key[:16]}")
    for other in partial_files(path):
        if overwrite:
            other.unlink()
        elif other != place:
            raise UsageError(
                "is the begin of this output by another model or other settings; --overwrite begins anew",
                where=str(other),
            )
    try:
        with contextlib.closing(PartialFile(place)) as file:
            yield file
            file.finish(path)
    except OSError as error:
        raise from_os_error(error, place) from error


def partial_files(path: Path) -> list[Path]:
    """What is kept of a file that is not finished."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return sorted(path.with_name(name) for name in names if name.startswith(path.name + _MARK))
