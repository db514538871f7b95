"""Rust libraries that panic: an input did it, and the user gets one line instead of a backtrace.

The tokenizers library and tiktoken raise `pyo3_runtime.PanicException`, a BaseException, and Rust prints the panic to
stderr before Python hears of it (seen with tokenizers 0.23.3 and the pattern `(a+)+$`: Oniguruma gives up after too
many retries).
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

from llmcli.errors import DataError

_stderr_lock = threading.RLock()


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic of a Rust library."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def contained(message: str, where: str | None = None, *, quiet: bool = True) -> Iterator[None]:
    """Turns a panic in the body into DataError(message); with `quiet` what Rust prints of it does not reach stderr."""
    with _held_stderr() if quiet else contextlib.nullcontext():
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            if not is_panic(error):
                raise
            raise DataError(message, where=where) from error


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
    """Holds back what is written to file descriptor 2; it is passed on afterwards unless the body panicked."""
    with _stderr_lock, contextlib.ExitStack() as stack:
        try:
            sys.stderr.flush()
            saved = os.dup(2)
        except (OSError, ValueError, AttributeError):  # no stderr to protect
            yield
            return
        stack.callback(os.close, saved)
        held = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except DataError as error:
            panicked = error.__cause__ is not None and is_panic(error.__cause__)
            raise
        finally:
            os.dup2(saved, 2)
            held.seek(0)
            written = held.read()
            if written and not panicked:
                os.write(2, written)
