"""The errors that a user sees: one line, where it is, what to do.

Invariant: every error that leaves an operation is an `LlmcliError`, and its class decides the exit code.
"""

from __future__ import annotations

import errno


class LlmcliError(Exception):
    """Something failed (exit code 1).

    `message` is one line: what is wrong and what to do about it.
    `where` is the place: a path, `file:line:column`, or the name of a field.
    """

    kind = "failed"
    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UsageError(LlmcliError):
    """The command was given what it cannot work with (exit code 2)."""

    kind = "usage"
    exit_code = 2


class ConfigError(LlmcliError):
    """A setting is unknown or out of its range (exit code 2)."""

    kind = "config"
    exit_code = 2


class DataError(LlmcliError):
    """A file that was read does not hold what it should (exit code 2)."""

    kind = "data"
    exit_code = 2


class CheckError(LlmcliError):
    """A check that was asked for did not hold (exit code 3)."""

    kind = "check"
    exit_code = 3


class CutShortError(LlmcliError):
    """Constrained output was cut short by the token limit (exit code 4)."""

    kind = "cut"
    exit_code = 4


class StoppedError(LlmcliError):
    """A signal stopped the work, which was saved first (exit code 128 + signal: 130, 143)."""

    kind = "stopped"

    def __init__(self, message: str, *, signal_number: int, where: str | None = None) -> None:
        super().__init__(message, where=where)
        self.exit_code = 128 + signal_number


class MissingExtraError(LlmcliError):
    """A feature needs a package of an extra that is not installed (exit code 2)."""

    kind = "missing-extra"
    exit_code = 2

    def __init__(self, package: str, extra: str, feature: str) -> None:
        super().__init__(f"{feature} needs the package {package}: pip install 'llmcli[{extra}]'")


def from_os_error(error: OSError, path: object = None) -> LlmcliError:
    """Turns an operating system's error into one line; what the user can mend is told."""
    where = str(path if path is not None else error.filename or "") or None
    # safetensors raises a FileNotFoundError that has no number.
    match errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno:
        case errno.ENOENT:
            return DataError("no such file or folder", where=where)
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return LlmcliError("no space left to write; free some and run it again", where=where)
        case errno.EACCES | errno.EPERM:
            return LlmcliError("permission denied", where=where)
        case errno.EROFS:
            return LlmcliError("the file system is read-only", where=where)
        case errno.EISDIR:
            return DataError("is a folder, a file was expected", where=where)
        case errno.ENOTDIR:
            return DataError("part of the path is a file, not a folder", where=where)
        case errno.ENAMETOOLONG:
            return DataError("the name is too long", where=where)
    return LlmcliError(error.strerror or str(error) or type(error).__name__, where=where)
