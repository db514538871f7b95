"""Writing is all or nothing: every call of files/atomic.py is made to fail, once and from then on, until none is left.

The method is SQLite's (RELIABILITY 1.1): fail the Nth call, for N = 1, 2, ..., until a run meets no fault.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmcli.errors import LlmcliError, UsageError
from llmcli.files import atomic, manifest

OLD, NEW = "old content\n" * 9, "new content\n" * 11


class Faults:
    """Fails the Nth call that meets it, and with `lasting` all after it."""

    def __init__(self, nth: int, fault: int | str, lasting: bool) -> None:
        self.nth, self.fault, self.lasting = nth, fault, lasting
        self.calls, self.struck = 0, False

    def __call__(self, operation: str, path: Path) -> int | None:
        self.calls += 1
        if self.calls != self.nth and not (self.lasting and self.calls > self.nth):
            return None
        if self.fault == "short":
            self.struck = True
            return 7 if operation == "write" else None
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.struck = True
        raise OSError(self.fault, os.strerror(int(self.fault)), str(path))


@pytest.fixture(autouse=True)
def _no_failpoint() -> Iterator[None]:
    yield
    atomic.failpoint = None


def write_one(place: Path) -> None:
    atomic.write_file(place / "deep" / "file.txt", NEW)


def write_rows(place: Path) -> None:
    with atomic.staged_file(place / "deep" / "file.txt", overwrite=True) as file:
        file.write(b"0" + NEW[1:].encode())
        file.seek(0)
        file.write(NEW[:1].encode())


def write_folder(place: Path) -> None:
    with atomic.staged_folder(place / "deep" / "folder", overwrite=True) as folder:
        (folder / "a.txt").write_text(NEW)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text(NEW)
        manifest.write_manifest(folder, {"seed": 0})


def old_file(place: Path) -> None:
    (place / "deep").mkdir()
    (place / "deep" / "file.txt").write_text(OLD)


def old_folder(place: Path) -> None:
    (place / "deep" / "folder").mkdir(parents=True)
    (place / "deep" / "folder" / "a.txt").write_text(OLD)


def nothing(place: Path) -> None:
    """There is nothing before."""


def content(place: Path) -> dict[str, str]:
    """Every file by its path; the manifest's hashes stand for themselves."""
    return {path.relative_to(place).as_posix(): path.read_text() for path in place.rglob("*") if path.is_file()}


CASES = [
    pytest.param(nothing, write_one, id="new-file"),
    pytest.param(old_file, write_one, id="replaced-file"),
    pytest.param(nothing, write_rows, id="new-rows"),
    pytest.param(old_file, write_rows, id="replaced-rows"),
    pytest.param(nothing, write_folder, id="new-folder"),
    pytest.param(old_folder, write_folder, id="replaced-folder"),
]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EACCES, "short"])
@pytest.mark.parametrize(("before", "write"), CASES)
def test_a_fault_at_any_call_leaves_old_or_new_whole(
    tmp_path: Path, before: Callable[[Path], None], write: Callable[[Path], None], fault: int | str, lasting: bool
) -> None:
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    before(wanted)
    old = content(wanted)
    write(wanted)
    new = content(wanted)
    for nth in range(1, 200):
        place = tmp_path / str(nth)
        place.mkdir()
        before(place)
        atomic.failpoint = faults = Faults(nth, fault, lasting)
        failed = False
        try:
            write(place)
        except LlmcliError as error:
            failed = error.exit_code == 1
        atomic.failpoint = None
        assert content(place) in ([new] if not failed else [old, new])
        assert not [path for path in place.rglob("*") if atomic.TEMPORARY in path.name]
        if failed and content(place) == {}:
            assert list(place.iterdir()) == [], "a folder made for the output is left behind"
        if not faults.struck:
            assert nth > 4, "the loop ended before it reached the calls"
            return
    pytest.fail("the writer never came to its end")


KILLER = """
    import os, signal, sys
    from pathlib import Path
    from llmcli.files import atomic
    sys.path.insert(0, sys.argv[1])
    import test_atomic
    if sys.argv[4] == "without-exchange":
        atomic._exchange = lambda first, second: False
    atomic.failpoint = test_atomic.Faults(int(sys.argv[3]), "kill", False)
    test_atomic.{write}(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("exchange", ["with-exchange", "without-exchange"])
@pytest.mark.parametrize(("before", "write"), [CASES[1], CASES[-1]])
def test_a_kill_at_any_call_leaves_old_or_new_whole_and_the_next_run_cleans_up(
    tmp_path: Path, before: Callable[[Path], None], write: Callable[[Path], None], exchange: str
) -> None:
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    before(wanted)
    old = content(wanted)
    write(wanted)
    new = content(wanted)
    script = textwrap.dedent(KILLER).replace("{write}", write.__name__)
    for nth in range(1, 60):
        place = tmp_path / str(nth)
        place.mkdir()
        before(place)
        words = [sys.executable, "-c", script, str(Path(__file__).parent), str(place), str(nth), exchange]
        ended = subprocess.run(words, capture_output=True, timeout=60).returncode
        atomic.remove_debris(place / "deep", "folder" if write is write_folder else "file.txt")
        assert content(place) in (old, new)
        write(place)
        assert content(place) == new
        if ended == 0:
            assert nth > 4
            return
        assert ended == -signal.SIGKILL
    pytest.fail("the writer never came to its end")


def test_another_process_at_work_is_not_taken_for_debris(tmp_path: Path) -> None:
    alive = tmp_path / f".model{atomic.TEMPORARY}{os.getppid()}-1"
    dead = tmp_path / f".model{atomic.TEMPORARY}{2**22 + 1}-1"
    other = tmp_path / f".models{atomic.TEMPORARY}{2**22 + 1}-1"
    for folder in (alive, dead, other):
        folder.mkdir()
    atomic.remove_debris(tmp_path, "model")
    assert alive.exists()
    assert not dead.exists()
    assert other.exists()


def test_what_the_body_raises_removes_the_folder(tmp_path: Path) -> None:
    for raised in (KeyboardInterrupt, ValueError, UsageError("no")):
        with pytest.raises(type(raised) if isinstance(raised, Exception) else raised):  # noqa: SIM117, PT012
            with atomic.staged_folder(tmp_path / "a" / "b") as folder:
                (folder / "x").write_text("half")
                raise raised
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "broken-link"])
def test_an_output_that_exists_is_refused_and_replaced_whole_with_overwrite(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text(OLD)
    elif kind == "folder":
        target.mkdir()
        (target / "stray.txt").write_text(OLD)
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--overwrite") as caught, atomic.staged_folder(target):
        pass
    assert caught.value.exit_code == 2
    assert not (target / "new.txt").exists()
    with atomic.staged_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text(NEW)
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert not target.is_symlink()
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic.staged_folder(tmp_path / "out") as folder:
        (folder / "new.txt").write_text(NEW)
    assert (tmp_path / "out" / "new.txt").read_text() == NEW


def test_the_working_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for place in (".", "..", "/"):
        with pytest.raises(UsageError, match="not replaced"):
            atomic.refuse_existing(place, overwrite=True)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_permissions_follow_the_mask_and_the_replaced_file(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        atomic.write_file(tmp_path / "new.txt", NEW)
        (tmp_path / "kept.txt").write_text(OLD)
        os.chmod(tmp_path / "kept.txt", 0o666)
        atomic.write_file(tmp_path / "kept.txt", NEW)
        with atomic.staged_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "kept.txt").stat().st_mode) == 0o666
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_a_link_at_the_target_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(OLD)
    (tmp_path / "out.txt").symlink_to(secret)
    atomic.write_file(tmp_path / "out.txt", NEW)
    assert secret.read_text() == OLD
    assert (tmp_path / "out.txt").read_text() == NEW
    assert not (tmp_path / "out.txt").is_symlink()


def test_a_long_name_is_written(tmp_path: Path) -> None:
    name = "字" * 80 + ".txt"  # 244 bytes
    atomic.write_file(tmp_path / name, NEW)
    assert (tmp_path / name).read_text() == NEW


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(LlmcliError, match="permission denied"):
        atomic.write_file(tmp_path / "a.txt", NEW)


def test_a_file_size_limit_of_the_kernel_is_one_error(tmp_path: Path) -> None:
    """The real thing beside the simulated one: RLIMIT_FSIZE refuses the write inside the kernel."""
    script = """
        import resource, signal, sys
        from llmcli.errors import LlmcliError
        from llmcli.files.atomic import write_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_file(sys.argv[1], b"x" * 5000)
        except LlmcliError as error:
            print(error)
            sys.exit(error.exit_code)
    """
    (tmp_path / "file").write_text(OLD)
    words = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "file")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "no space left" in ended.stdout
    assert content(tmp_path) == {"file": OLD}


def test_a_second_process_is_kept_out_by_the_lock(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from llmcli.errors import LlmcliError
        from llmcli.files.atomic import locked
        try:
            with locked(Path(sys.argv[1]), "run"):
                print("in")
        except LlmcliError as error:
            print(error)
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with atomic.locked(tmp_path, "run"):
        inside = subprocess.run(words, capture_output=True, text=True, timeout=60)
    outside = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "another process is using this run" in inside.stdout
    assert outside.stdout == "in\n"


def test_a_manifest_finds_every_flipped_byte_and_every_odd_file(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.txt").write_text(OLD)
    manifest.write_manifest(tmp_path, {"seed": 7})
    assert manifest.manifest_problems(tmp_path) == []
    whole = (tmp_path / "weights.bin").read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / "weights.bin").write_bytes(bytes(flipped))
        assert manifest.manifest_problems(tmp_path) == ["weights.bin: its sha256 is not the manifest's"]
    (tmp_path / "weights.bin").write_bytes(whole[:-1])
    assert "255 bytes" in manifest.manifest_problems(tmp_path)[0]
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "stray.txt").write_text("?")
    assert manifest.manifest_problems(tmp_path) == ["weights.bin: missing", "stray.txt: not in the manifest"]


@pytest.mark.parametrize("name", ["../out.txt", "/etc/passwd", "a/../../out.txt"])
def test_a_manifest_cannot_name_a_file_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "out.txt").write_text(OLD)
    entry = {"size": len(OLD), "sha256": manifest.sha256_of(tmp_path / "out.txt")}
    (folder / "manifest.json").write_text(json.dumps({"files": {name: entry}, "lineage": {}}))
    assert manifest.manifest_problems(folder) == [f"{name}: the manifest names a path outside the folder"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": [], "lineage": {}}', "[" * 100_000])
def test_what_is_no_manifest_is_one_problem(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert len(manifest.manifest_problems(tmp_path)) == 1
