"""Streams and exit codes: stdout holds the result, an error is one line on stderr, and the code says its kind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT, Run
from hypothesis import given
from hypothesis import strategies as st

from llmcli import config as configs
from llmcli import errors
from llmcli.cli.options import GroupedCommand, prompt_text, settings, shared_options
from llmcli.cli.streams import as_json, printable

# A command of which every way to fail can be asked for, run as the real ones are.
FAILING = """
    import sys
    import click
    from llmcli import errors
    from llmcli.cli.options import GroupedCommand, shared_options
    from llmcli.cli.streams import guarded, notice, write_json, write_out

    class PanicException(BaseException):
        pass

    @click.command(cls=GroupedCommand)
    @click.argument("how")
    @shared_options
    def fail(how):
        "Fails."
        if how == "panic":
            raise PanicException("regex gave up")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "lines":
            notice("a notice")
            while True:
                write_out("line\\n" * 1000)
        if how == "write":
            notice("a notice")
            return write_out("written\\n")
        if how == "json":
            notice("a notice")
            return write_json({"x": float("nan"), "name": "e\\u0301\\x1b[2J"})
        if how == "wait":
            import time
            write_out("waiting\\n")
            time.sleep(60)
        raise eval(how, {**vars(errors), "OSError": OSError, "ValueError": ValueError, "MemoryError": MemoryError})

    guarded(fail)
"""


def run_failing(
    *words: str, environment: dict[str, str] | None = None, **details: object
) -> subprocess.CompletedProcess[str]:
    given_details = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 60, **details}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FAILING), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        **given_details,  # type: ignore[call-overload]
    )


CODES = [
    ("LlmcliError('it broke', where='a.txt:3:7')", 1, "failed"),
    ("UsageError('no')", 2, "usage"),
    ("ConfigError('no')", 2, "config"),
    ("DataError('no')", 2, "data"),
    ("CheckError('no')", 3, "check"),
    ("CutShortError('no')", 4, "cut"),
    ("StoppedError('saved', signal_number=15)", 143, "stopped"),
    ("MissingExtraError('matplotlib', 'plot', 'drawing')", 2, "missing-extra"),
    ("OSError(28, 'No space left on device', 'out')", 1, "failed"),
    ("OSError(2, 'No such file or directory', 'out')", 2, "data"),
    ("ValueError('odd\\nsecond line')", 1, "failed"),
    ("MemoryError()", 1, "failed"),
    ("panic", 1, "failed"),
    ("interrupt", 130, "failed"),
]


@pytest.mark.parametrize(("how", "code", "kind"), CODES)
def test_an_error_is_one_line_and_its_kind_is_the_exit_code(how: str, code: int, kind: str) -> None:
    plain = run_failing(how)
    assert plain.returncode == code
    assert plain.stdout == ""
    lines = plain.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in plain.stderr
    as_object = run_failing("--json", how)
    assert as_object.returncode == code
    assert as_object.stdout == ""
    found = json.loads(as_object.stderr.strip().splitlines()[-1])["error"]
    assert set(found) == {"kind", "message", "where"}
    assert found["kind"] == kind


def test_where_it_is_stands_first() -> None:
    assert run_failing(CODES[0][0]).stderr == "Error: a.txt:3:7: it broke\n"


@pytest.mark.parametrize("how", ["ValueError('odd')", "panic", "DataError('no')"])
def test_a_traceback_comes_with_vv_alone(how: str) -> None:
    assert "Traceback" not in run_failing("-v", how).stderr
    ended = run_failing("-vv", how)
    assert "Traceback" in ended.stderr
    assert ended.returncode != 0


def test_a_closed_pipe_ends_quietly() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FAILING), "lines"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    noise = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 0
    assert noise == b"a notice\n"


def test_help_into_a_closed_pipe_ends_quietly() -> None:
    words = f"{sys.executable} -c 'import llmcli.cli.main as m; m.run()' --help; echo $? >&2"
    ended = subprocess.run(
        ["bash", "-c", f"sleep 0.2 | ({words}) | true"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stderr == "0\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_behind_stdout_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        ended = run_failing("write", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "Error: <stdout>: no space left to write; free some and run it again"


def test_sigterm_is_143_and_one_line() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FAILING), "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _out, noise = child.communicate(timeout=60)
    assert child.returncode == 143
    assert noise == "Error: terminated\n"


def test_notices_go_to_stderr_and_json_and_quiet_silence_them() -> None:
    plain = run_failing("write")
    assert (plain.stdout, plain.stderr) == ("written\n", "a notice\n")
    assert run_failing("write", "-q").stderr == ""
    assert run_failing("json", "--json").stderr == ""


def test_json_is_valid_whatever_is_in_it() -> None:
    ended = run_failing("json", "--json")
    assert json.loads(ended.stdout) == {"x": None, "name": "e\u0301\x1b[2J"}
    assert "\x1b" not in ended.stdout
    narrow = run_failing("json", "--json", environment={"PYTHONIOENCODING": "ascii"})
    assert json.loads(narrow.stdout) == json.loads(ended.stdout)


def test_control_characters_of_an_error_do_not_reach_the_terminal() -> None:
    ended = run_failing("DataError('\\x1b]52;c;ZXZpbA==\\x07 \\x9b2J \\u202e', where='\\x1b[31mname')")
    assert not set(ended.stderr) & set("\x1b\x07\x9b\u202e")


@given(st.text())
def test_printable_keeps_newlines_and_tabs_of_the_controls(text: str) -> None:
    kept = printable(text)
    assert not [letter for letter in kept if ord(letter) < 32 and letter not in "\n\t"]
    assert printable(kept) == kept


def test_a_console_that_is_not_utf8_gets_no_traceback(fresh_llmcli: Run) -> None:
    for encoding in ("ascii", "cp1252"):
        ended = fresh_llmcli(
            "info", "naïve-字", environment={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, encoding=encoding
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("Error: na")
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}, {}])
def test_what_is_piped_has_no_colour(llmcli: Run, variable: dict[str, str]) -> None:
    for words in (["--help"], ["info", "nowhere"], ["nonsense"]):
        ended = llmcli(*words, environment=variable)
        assert "\x1b" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nonsense"], "No such command"),
        (["inf"], "did you mean info?"),
        (["info"], "Missing argument"),
        (["info", "--nonsense", "x"], "No such option"),
        (["info", "nowhere"], "nowhere: no such file or folder"),
        (["plot", "nowhere", "-o", "x.gif"], "must end in .svg or .png"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(llmcli: Run, words: list[str], told: str, tmp_path: Path) -> None:
    ended = llmcli(*words, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_version_and_help_are_results(fresh_llmcli: Run) -> None:
    from llmcli import __version__

    assert fresh_llmcli("--version").stdout == f"llmcli {__version__}\n"
    assert fresh_llmcli("-h").stdout == fresh_llmcli("--help").stdout
    bare = fresh_llmcli()
    assert bare.returncode == 2
    assert "Usage:" in bare.stderr + bare.stdout


# ----------------------------------------------------------------------------------------------------------------
# Settings: a flag beats the variable beats the file beats the default


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Settings of every type."""

    learning_rate: float = configs.setting(0.1, "Rate.", above=0, aliases=("--lr",))
    layers: int = configs.setting(2, "Layers.", minimum=1, maximum=9)
    kind: str = configs.setting("a", "Kind.", choices=("a", "b"))
    names: tuple[str, ...] = configs.setting((), "Names.", flag="--name")
    limit: int | None = configs.setting(None, "Limit.")
    warm: bool = configs.setting(True, "Warm.")


@click.command(cls=GroupedCommand)
@settings(SampleConfig)
@shared_options
def sample(sample_config: SampleConfig) -> None:
    """Shows its settings."""
    click.echo(json.dumps(dataclasses.asdict(sample_config)))


def show(*words: str, environment: dict[str, str] | None = None) -> dict[str, object]:
    result = CliRunner().invoke(sample, list(words), env=environment, auto_envvar_prefix="LLMCLI_SAMPLE")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_a_flag_beats_the_variable_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('learning_rate = 0.2\nlayers = 3\nkind = "b"\nnames = ["x", "y"]\nwarm = false\n')
    assert show() == {"learning_rate": 0.1, "layers": 2, "kind": "a", "names": [], "limit": None, "warm": True}
    assert show("-c", str(file)) == {
        "learning_rate": 0.2,
        "layers": 3,
        "kind": "b",
        "names": ["x", "y"],
        "limit": None,
        "warm": False,
    }
    variables = {"LLMCLI_SAMPLE_LAYERS": "4", "LLMCLI_SAMPLE_WARM": "1"}
    found = show("-c", str(file), environment=variables)
    assert (found["layers"], found["warm"], found["learning_rate"]) == (4, True, 0.2)
    found = show("-c", str(file), "--layers", "5", "--lr", "0.5", "--no-warm", environment=variables)
    assert (found["layers"], found["learning_rate"], found["warm"]) == (5, 0.5, False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rat = 1.0", "did you mean learning_rate?"),
        ("[table]\nlayers = 2", "unknown key 'table'"),
        ("layers = ", "is not valid TOML"),
        ("layers = 0", "must be at least 1"),
        ("layers = 10", "must be at most 9"),
        ("learning_rate = 0.0", "must be greater than 0"),
        ("learning_rate = nan", "NaN"),
        ('kind = "c"', "'c' is not one of"),
        ('layers = "many"', "not a valid integer"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_the_key(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    result = CliRunner().invoke(sample, ["-c", str(tmp_path / "run.toml")])
    assert result.exit_code != 0
    assert told in result.output + str(result.exception)


TOML_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.lists(st.integers(-9, 9) | st.booleans(), max_size=3),
    st.lists(st.text(), max_size=3),
)
TOML_KEYS = st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True)


@given(st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=5), st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=3))
def test_what_to_toml_writes_tomllib_reads(plain: dict[str, object], inner: dict[str, object]) -> None:
    values = {**plain, "table": inner}
    assert tomllib.loads(configs.to_toml(values)) == values


@given(
    st.builds(
        SampleConfig,
        learning_rate=st.floats(1e-300, 1e300),
        layers=st.integers(1, 9),
        kind=st.sampled_from(["a", "b"]),
        names=st.lists(st.text()).map(tuple),
        limit=st.none() | st.integers(-99, 99),
        warm=st.booleans(),
    )
)
def test_a_config_survives_its_file(config: SampleConfig) -> None:
    text = configs.to_toml(dataclasses.asdict(config))
    assert configs.from_mapping(SampleConfig, tomllib.loads(text)) == config


def test_unknown_keys_of_a_mapping_name_the_nearest() -> None:
    with pytest.raises(errors.ConfigError, match="did you mean layers"):
        configs.from_mapping(SampleConfig, {"layer": 2})


# ----------------------------------------------------------------------------------------------------------------
# Input


@pytest.mark.parametrize(
    ("words", "piped", "joined"),
    [
        (["a", "b"], None, "a b"),
        ([], None, None),
        (["-"], "text\n", "text\n"),
        ([], "text\n", "text\n"),
        (["end"], "text", "text\nend"),
        (["end"], "text\n", "text\nend"),
        (["end"], "", "end"),
    ],
)
def test_piped_text_and_argument_are_joined(words: list[str], piped: str | None, joined: str | None) -> None:
    assert prompt_text(words, read_stdin=lambda: piped or "", piped=piped is not None) == joined


def test_as_json_makes_what_is_not_finite_null() -> None:
    assert as_json({"a": [float("inf"), 1.5], "p": Path("x")}) == {"a": [None, 1.5], "p": "x"}


# ----------------------------------------------------------------------------------------------------------------
# Nothing calls home

NO_SOCKETS = """
    import socket, sys

    def barred(*arguments, **details):
        raise AssertionError("a socket was opened")

    socket.socket.connect = barred
    socket.create_connection = socket.getaddrinfo = barred
    import llmcli.cli.main
    llmcli.cli.main.run()
"""


@pytest.mark.parametrize("words", [["--help"], ["doctor"], ["doctor", "--json"], ["info", "{tokenizer}"]])
def test_no_socket_is_opened(words: list[str], tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NO_SOCKETS), *[word.format(tokenizer=tmp_path) for word in words]],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
