"""Writing: a file or a folder appears whole or not at all.

Invariant: nothing else in the package opens a final path for writing. Everything is written to a sibling whose name
begins with `.` and holds `.tmp-`, synced, and renamed into its place; the folder that holds it is synced after.
The order follows SQLite's and RELIABILITY's rule: data, then name, then the folder of the name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmcli.errors import LlmcliError, UsageError, from_os_error

TEMPORARY = ".tmp-"  # part of the name of everything that is not finished

# Tests put a function here that raises or kills at the Nth call: (operation, path).
failpoint: Callable[[str, Path], None] | None = None


def _reach(operation: str, path: Path) -> None:
    if failpoint is not None:
        failpoint(operation, path)


def sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's names, to the disk."""
    _reach("fsync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(source: Path, target: Path) -> None:
    _reach("rename", target)
    os.replace(source, target)


def _current_umask() -> int:
    """Reading the mask means setting it; done once a write, no thread of ours creates files beside it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _temporary_sibling(path: Path, *, folder: bool) -> Path:
    """A new, exclusive name beside `path`, so that the rename never crosses a file system."""
    prefix = f".{path.name[:100]}{TEMPORARY}{os.getpid()}-"
    _reach("create", path)
    if folder:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    os.close(handle)
    return Path(name)


def write_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a whole file atomically, keeping the permissions of the file that it replaces.

    Raises LlmcliError for what the operating system refuses; the old file is then untouched.
    """
    target = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        make_folders(target.parent)
        temporary = _temporary_sibling(target, folder=False)
        with open(temporary, "wb") as file:
            _reach("write", target)
            file.write(content)
            file.flush()
            _reach("fsync", target)
            os.fsync(file.fileno())
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_current_umask()
        os.chmod(temporary, mode)
        _rename(temporary, target)
        temporary = None
        sync(target.parent)
    except OSError as error:
        raise from_os_error(error, target) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON, indented, keys in the order given, with a newline at the end."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def make_folders(path: Path) -> None:
    """Creates the folders on the way to `path`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, path) from error


def refuse_existing(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raises UsageError when the output exists (an empty folder does not count) and may not be replaced.

    Called before the work begins, so that nobody waits an hour to be refused.
    """
    target = Path(path)
    if overwrite or not (target.exists() or target.is_symlink()):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise UsageError("exists already; choose another place, or replace it whole with --overwrite", where=str(path))


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write into; on success it becomes `path`, on any failure it is removed.

    An old folder is moved aside first and removed last: at no moment is there a half of both.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    temporary: Path | None = None
    try:
        make_folders(target.parent)
        remove_debris(target.parent, target.name)
        temporary = _temporary_sibling(target, folder=True)
        os.chmod(temporary, 0o777 & ~_current_umask())
        yield temporary
        for root, _folders, names in os.walk(temporary):
            for name in names:
                sync(Path(root, name))
            sync(Path(root))
        _put_in_place(temporary, target)
        temporary = None
        sync(target.parent)
    except OSError as error:
        raise from_os_error(error, target) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames a finished folder to its name; what stood there goes aside first and is deleted after."""
    if target.is_dir() and not target.is_symlink() and any(target.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}{TEMPORARY}{os.getpid()}-old-", dir=target.parent))
        _rename(target, aside)
        try:
            _rename(temporary, target)
        except BaseException:
            os.replace(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        if target.is_file() or target.is_symlink():
            target.unlink()
        _rename(temporary, target)


def remove_debris(folder: Path, name: str = "") -> None:
    """Removes what a killed process of ours left in `folder`: temporary siblings whose process is gone."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(f".{name}") or TEMPORARY not in entry.name:
            continue
        owner = entry.name.rsplit(TEMPORARY, 1)[1].split("-", 1)[0]
        if not owner.isdigit() or _is_running(int(owner)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Holds an exclusive lock on `folder` while the body runs; a second process gets one line, not a broken folder."""
    import fcntl

    make_folders(folder)
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise from_os_error(error, folder) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LlmcliError(f"another process is using this {what}", where=str(folder)) from error
        yield
    finally:
        os.close(handle)
