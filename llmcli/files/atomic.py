"""Writing: a file or a folder appears whole or not at all.

Invariant: nothing else in the package opens a final path for writing. Everything is written to a sibling whose name
begins with `.` and holds `.tmp-`, synced, and renamed into its place; the folder that holds it is synced after.
The order follows SQLite's and RELIABILITY's rule: data, then name, then the folder of the name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llmcli.errors import DataError, LlmcliError, UsageError, from_os_error

TEMPORARY = ".tmp-"  # part of the name of everything that is not finished
OLD = "old-"  # marks what was moved aside
_PROCESS = os.urandom(4).hex()  # in a container every process may have the same number: this tells them apart

# Tests put a function here that raises or kills at the Nth call: (operation, path). For "write" it may return how many
# bytes the system shall take of what is left, which is a short write.
failpoint: Callable[[str, Path], int | None] | None = None


def _reach(operation: str, path: Path) -> int | None:
    return None if failpoint is None else failpoint(operation, path)


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


def _sibling(path: Path, mark: str = "") -> Path:
    """A name beside `path` that nobody can foresee, so that the rename never crosses a file system."""
    return path.with_name(f"{_stem(path.name)}{TEMPORARY}{os.getpid()}-{mark}{_PROCESS}{os.urandom(8).hex()}")


def _stem(name: str) -> str:
    """How a temporary name begins; cut, as names have at most 255 bytes."""
    return "." + os.fsdecode(os.fsencode(name)[:100])


def _write_all(handle: int, content: bytes, path: Path) -> None:
    """Writes until all is written: the system may take less than it is given."""
    rest = memoryview(content)
    while rest:
        taken = _reach("write", path)
        rest = rest[os.write(handle, rest if taken is None else rest[: max(taken, 1)]) :]


def write_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a whole file atomically, keeping the permissions of the file that it replaces.

    A link at the path is replaced, not written through. Raises LlmcliError for what the operating system refuses; the
    old file is then untouched.
    """
    target = Path(path)
    try:
        content = data.encode("utf-8") if isinstance(data, str) else data
    except UnicodeEncodeError as error:  # a file's name that is to be written down
        raise DataError("cannot hold a name that is not UTF-8; rename that file", where=str(target)) from error
    with _replaced(target) as temporary:
        kept = stat.S_IMODE(target.lstat().st_mode) if target.is_file() and not target.is_symlink() else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(temporary, flags, 0o666 if kept is None else kept)
        try:
            if kept is not None:
                _reach("chmod", target)
                os.fchmod(handle, kept)  # the mask took from it what the old file may have had
            _write_all(handle, content, target)
            _reach("fsync", target)
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Yields a temporary sibling of `path`, open to write and to go back in; on success it becomes `path`.

    On any failure it is removed. What stands at `path` is replaced in one step.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    with _replaced(target) as temporary:
        remove_debris(target.parent, target.name)
        with open(temporary, "xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            _reach("fsync", target)
            os.fsync(file.fileno())


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """Yields the name of a sibling to make; when it is made and synced, it becomes `target`, else it is removed."""
    temporary: Path | None = None
    created: list[Path] = []
    try:
        _create_folders(target.parent, created)
        _reach("create", target)
        temporary = _sibling(target)
        yield temporary
        _rename(temporary, target)
        temporary = None
        created.clear()
        sync(target.parent)
    except OSError as error:
        raise from_os_error(error, target) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        _remove_empty(created)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON, indented, keys in the order given, with a newline at the end."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def make_folders(path: Path) -> None:
    """Creates the folders on the way to `path`."""
    try:
        _create_folders(path, [])
    except OSError as error:
        raise from_os_error(error, path) from error


def _create_folders(path: Path, created: list[Path]) -> None:
    """Creates what is missing on the way to `path` and notes it in `created`, outermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    missing.reverse()
    for folder in missing:
        _reach("mkdir", folder)
        folder.mkdir(exist_ok=True)
        created.append(folder)
        sync(folder.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _remove_empty(folders: list[Path]) -> None:
    """After a failure: the folders that were made for the output, as far as they are still empty."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_existing(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raises UsageError when the output exists (an empty folder does not count) and may not be replaced.

    Called before the work begins, so that nobody waits an hour to be refused.
    """
    target = Path(path)
    if overwrite and target.is_dir() and target.resolve() in (Path.home(), Path.cwd(), *Path.cwd().parents):
        raise UsageError("is the home or the working folder, or holds it: it is not replaced", where=str(path))
    if overwrite or not (target.exists() or target.is_symlink()):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise UsageError("exists already; choose another place, or replace it whole with --overwrite", where=str(path))


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write into; on success it becomes `path`, on any failure it is removed.

    What stands at `path` is exchanged for it in one step where the system can, so there is always one of the two.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    temporary: Path | None = None
    created: list[Path] = []
    try:
        _create_folders(target.parent, created)
        remove_debris(target.parent, target.name)
        _reach("create", target)
        temporary = _sibling(target)
        temporary.mkdir()
        yield temporary
        for root, _folders, names in os.walk(temporary):
            for name in names:
                sync(Path(root, name))
            sync(Path(root))
        _put_in_place(temporary, target)
        temporary = None
        created.clear()
        sync(target.parent)
    except OSError as error:
        raise from_os_error(error, target) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(created)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name; what stood there is deleted after."""
    if not (target.exists() or target.is_symlink()) or _is_empty(target):
        _rename(temporary, target)
    elif _exchange(temporary, target):
        _delete(temporary)
    else:
        aside = _sibling(target, OLD)
        aside.mkdir()
        try:
            _rename(target, aside / OLD)
            _rename(temporary, target)
        except BaseException:
            _restore(aside, target)
            raise
        _delete(aside)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux: renameat2 with RENAME_EXCHANGE). False where the system cannot."""
    import ctypes

    _reach("rename", second)
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _restore(aside: Path, target: Path) -> None:
    """Puts back what was moved aside, unless something stands in its place already."""
    if not target.exists() and (aside / OLD).exists():
        os.replace(aside / OLD, target)
    with contextlib.suppress(OSError):
        aside.rmdir()


def _delete(path: Path) -> None:
    """Removes a file, link or folder of ours that nobody needs; what cannot be removed is left to the next run."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_folder(path: Path) -> None:
    """Removes a folder that nobody needs. Its name goes first, so that no kill leaves half of it under that name."""
    aside = _sibling(path)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
        _delete(aside)


@contextlib.contextmanager
def moved_aside(folder: Path, names: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Moves `names` of `folder` out of the way. When the body fails, what it made of them goes and the old come back.

    Yields a function; once the body has called it, the old ones are deleted and what was made stays, come what may.
    """
    old = _sibling(folder / "replaced")
    present = [name for name in names if os.path.lexists(folder / name)]
    over = False

    def keep() -> None:
        nonlocal over
        over = True
        _delete(old)

    try:
        try:
            if present:
                old.mkdir()
            for name in present:
                _rename(folder / name, old / name)
        except OSError as error:
            raise from_os_error(error, folder) from error
        yield keep
    except BaseException:
        if not over:
            for name in names:
                if name not in present or os.path.lexists(old / name):
                    _delete(folder / name)
            for name in present:
                with contextlib.suppress(OSError):
                    os.replace(old / name, folder / name)
            with contextlib.suppress(OSError):
                old.rmdir()
        raise
    keep()


def remove_debris(folder: Path, name: str = "") -> None:
    """Removes what a killed process of ours left in `folder` for the output `name` (any, when empty).

    A folder that was moved aside by a process killed before it put the new one in place is put back.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        stem, found, rest = entry.name.rpartition(TEMPORARY)
        owner, _, mark = rest.partition("-")
        if not found or stem[:1] != "." or (name and stem != _stem(name)):
            continue
        if not owner.isdigit() or _is_owned(int(owner), mark):
            continue
        target = folder / (name or stem[1:])
        if mark.startswith(OLD):
            with contextlib.suppress(OSError):
                _restore(entry, target)
        if not mark.startswith(OLD) or target.exists():
            _delete(entry)


def _is_owned(process: int, mark: str) -> bool:
    """Whether the process that made a temporary name is still running."""
    if process == os.getpid():
        return mark.removeprefix(OLD).startswith(_PROCESS)
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
