"""Streams: stdout carries the result, stderr everything else; one place turns errors into lines and exit codes.

Invariant: a failure is one line (or one JSON object) on stderr and a non-zero exit code; a traceback only with -vv.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from llmcli.errors import LlmcliError, StoppedError, from_os_error

# C0 but tab and newline, DEL, C1, and the marks that change the direction of text: a model's output or a file's name
# may hold them, and a terminal would obey (RELIABILITY 1.10).
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def printable(text: str) -> str:
    """The text without the characters that a terminal would obey."""
    return text.translate(_CONTROLS)


def write_out(text: str) -> None:
    """Writes to stdout and flushes. Filtered only where a terminal reads it: pipes and files get it raw."""
    if sys.stdout.isatty():
        text = printable(text)
    with _stdout_may_fail():
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:  # a console that is not UTF-8
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def as_json(record: Any) -> Any:
    """A record as plain JSON values: dataclasses become objects, what is not finite becomes null."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: as_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): as_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [as_json(item) for item in record]
    if isinstance(record, float) and (record != record or record in (float("inf"), float("-inf"))):
        return None
    if isinstance(record, os.PathLike):
        return os.fspath(record)
    return record


def write_json(record: Any) -> None:
    """Writes one JSON object on one line to stdout."""
    write_out(json.dumps(as_json(record), ensure_ascii=not _is_utf8(sys.stdout)) + "\n")


def writes_ascii() -> bool:
    """Whether stdout takes ASCII alone, as far as is known."""
    return not _is_utf8(sys.stdout)


def _is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def notice(text: str) -> None:
    """One line on stderr for the reader; silent under --quiet and under --json."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context else None
    if found is None or not (found.quiet or found.json):
        click.echo(_for_stderr(text), err=True)


def _for_stderr(text: str) -> str:
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    return printable(text).encode(encoding, "replace").decode(encoding)


def read_stdin() -> str:
    """The whole of stdin as UTF-8 text, not a byte stripped. Raises DataError for bytes that are not UTF-8."""
    from llmcli.errors import DataError

    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("is not valid UTF-8", where=f"<stdin>:{line}:byte {error.start}") from error


def stdin_is_piped() -> bool:
    """Whether stdin is a pipe or a file: no terminal, no /dev/null (which batch jobs get), and there at all."""
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except io.UnsupportedOperation:  # text in memory, put in stdin's place
        return not sys.stdin.isatty()
    except (AttributeError, ValueError, OSError):
        return False


def fail(error: LlmcliError, *, as_object: bool) -> NoReturn:
    """Says the error on stderr, as a line or as JSON, and exits with its code."""
    if as_object:
        body = {"kind": error.kind, "message": error.message, "where": error.where}
        text = json.dumps({"error": body})
    else:
        text = "Error: " + " ".join(str(error).splitlines())
    click.echo(_for_stderr(text), err=True)
    _leave(error.exit_code)


def _leave(code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
    sys.exit(code)


def _silence_stdout() -> None:
    """After a closed pipe Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guarded(command: click.Command, arguments: list[str] | None = None) -> NoReturn:
    """Runs a command to its exit code: errors become lines, a closed pipe ends quietly, Ctrl-C is 130."""
    words = sys.argv[1:] if arguments is None else arguments
    stdout = sys.stdout
    signal.signal(signal.SIGTERM, _terminate)  # so that what is half-written is removed on the way out
    as_object, loud = "--json" in words, "-vv" in words or words.count("-v") + words.count("--verbose") > 1
    try:
        code = command.main(words, prog_name="llmcli", standalone_mode=False, auto_envvar_prefix="LLMCLI")
        with _stdout_may_fail():
            sys.stdout.flush()
        _leave(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        _leave(error.exit_code)
    except click.ClickException as error:
        fail(_of_click(error), as_object=as_object)
    except BrokenPipeError:
        _silence_stdout()
        sys.exit(0)
    except SystemExit:
        # On a closed pipe, which is no failure, Click replaces stdout and leaves with 1.
        if sys.stdout is stdout:
            raise
        sys.stdout = stdout
        _silence_stdout()
        sys.exit(0)
    except (KeyboardInterrupt, click.Abort):
        fail(_interrupted(), as_object=as_object)
    except Exception as error:
        if loud:
            raise
        fail(_of_exception(error), as_object=as_object)
    except BaseException as error:
        # Rust's panics (tokenizers, safetensors) are BaseException: an input did it, a backtrace helps nobody.
        if loud or type(error).__name__ != "PanicException":
            raise
        fail(LlmcliError(f"a library gave up on this input: {error}"), as_object=as_object)


@contextlib.contextmanager
def _stdout_may_fail() -> Iterator[None]:
    """A full disk behind stdout is an error that names it; a closed pipe is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence_stdout()
        raise from_os_error(error, "<stdout>") from error


def _terminate(number: int, _frame: object) -> NoReturn:
    raise StoppedError("terminated", signal_number=number)


def _interrupted() -> LlmcliError:
    error = LlmcliError("interrupted")
    error.exit_code = 130
    return error


def _of_click(error: click.ClickException) -> LlmcliError:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    made = LlmcliError(error.format_message() + hint)
    made.kind, made.exit_code = "usage", error.exit_code
    return made


def _of_exception(error: Exception) -> LlmcliError:
    if isinstance(error, LlmcliError):
        return error
    if isinstance(error, OSError):
        return from_os_error(error)
    # torch raises RuntimeErrors of its own for it, on the CPU and on CUDA.
    full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or full:
        return LlmcliError("out of memory; a smaller model, batch or context needs less")
    reason = str(error).splitlines()[0] if str(error) else ""
    return LlmcliError(
        f"unexpected {type(error).__name__}: {reason} (run again with -vv for the traceback, and report it)"
    )
