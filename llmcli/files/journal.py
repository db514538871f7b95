"""Journals: files that grow by whole lines, one JSON object each (JSON Lines).

Invariant: a line is written in one piece and flushed; a torn last line, left by a crash, is cut off at the next
opening.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcli.errors import from_os_error
from llmcli.files.atomic import make_folders


class Journal:
    """Appends records to a JSON Lines file. `keep`: which of the records that stand there stay (None: all)."""

    def __init__(self, path: Path, *, keep: Callable[[Mapping[str, Any]], bool] | None = None) -> None:
        self.path = path
        make_folders(path.parent)
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 -- closed by close()
            self._file.truncate(self._sound_length(keep))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise from_os_error(error, path) from error

    def _sound_length(self, keep: Callable[[Mapping[str, Any]], bool] | None) -> int:
        """The length up to the first line that is torn or not to be kept: records stand in order, a cut is enough."""
        self._file.seek(0)
        length = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or (keep is not None and not keep(record)):
                break
            length += len(line)
        return length

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; values that are None are left out."""
        kept = {key: value for key, value in record.items() if value is not None}
        try:
            # Half a surrogate pair has no UTF-8; its escape is JSON's too.
            line = json.dumps(kept, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
            self._file.write(line + b"\n")
            self._file.flush()
        except OSError as error:
            raise from_os_error(error, self.path) from error

    def sync(self) -> None:
        """Forces what was written to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise from_os_error(error, self.path) from error

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:  # what a full disk did not take is tried once more
            raise from_os_error(error, self.path) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
