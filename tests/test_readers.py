"""Reading files: formats, compressions, encodings, and what is wrong with them, told with file, line and column."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcli.config import TextConfig
from llmcli.data import encodings, formats, json_values, readers, tables
from llmcli.data.formats import find_inputs
from llmcli.data.readers import Document, ReadLog, cut_place, pieces, read_documents
from llmcli.errors import ConfigError, DataError, LlmcliError, UsageError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
Put = Callable[[str, "bytes | str"], str]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes a file into an empty folder that is the current one, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: bytes | str) -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def read(*inputs: str, **options: str) -> list[Document]:
    return list(read_documents(inputs, TextConfig(**options)))


def texts(*inputs: str, **options: str) -> list[str]:
    return [document.text for document in read(*inputs, **options)]


def refused(*inputs: str, **options: str) -> str:
    with pytest.raises(LlmcliError) as caught:
        read(*inputs, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------
# Formats

JSONL = '{"text": "eins\\n", "id": 1}\n\n{"text": "zw\\u00f6lf"}\n'
WANTED = ["eins\n", "zwölf"]


def parquet(column: list[object], name: str = "text") -> bytes:
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    files.write_table(pyarrow.table({name: column, "id": list(range(len(column)))}), buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.jsonl", JSONL, "text"),
        ("a.ndjson", JSONL, "text"),
        ("a.json", '[{"text": "eins\\n"},\n {"text": "zwölf"}]', "text"),
        ("a.json", '["eins\\n", "zwölf"]', "text"),
        ("a.json", JSONL, "text"),
        ("a.json", '[{"lines": ["eins", ""]}, {"lines": ["zwölf"]}]', "lines"),
        ("a.csv", 'id,text\n1,"eins\n"\n2,zwölf\n', "text"),
        ("a.csv", 'id,text\r\n1,"eins\n"\r\n2,zwölf', "text"),
        ("a.csv", '1,"eins\n"\n2,zwölf\n', "2"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_each_format_gives_its_texts(
    put: Put, name: str, content: str, field: str, compress: Callable[[bytes], bytes]
) -> None:
    assert texts(put(name, compress(content.encode())), text_field=field) == WANTED


def test_parquet_and_zstd(put: Put) -> None:
    zstandard = pytest.importorskip("zstandard")
    rows = ["eins", "zwölf", None, "drei", ""]
    assert texts(put("a.parquet", parquet(rows))) == ["eins", "zwölf", "", "drei", ""]
    assert texts(put("b.parquet", zstandard.compress(parquet(rows)))) == ["eins", "zwölf", "", "drei", ""]
    assert texts(put("c.parquet", parquet([["a", "b"], ["c"]]))) == ["a\nb", "c"]
    assert read("a.parquet")[3].line == 4
    assert texts(put("a.txt.zst", zstandard.compress(b"eins\n") + zstandard.compress(b"zwei\n"))) == ["eins\nzwei\n"]
    assert "column 'body' is missing; found: 'text', 'id'" in refused("a.parquet", text_field="body")
    assert "a.parquet:row 1: field 'id' holds a number" in refused("a.parquet", text_field="id")


def test_a_forged_count_of_rows_is_refused(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a.parquet", parquet(["a"] * 3))
    monkeypatch.setattr(tables, "_ROWS_A_BYTE", 0.001)
    assert "a.parquet: claims 3 rows in" in refused("a.parquet")


def test_tsv_takes_quotes_as_they_are_unless_the_whole_cell_is_quoted(put: Put) -> None:
    put("a.tsv", '"so what , he said\t1\n"quoted ""whole"""\t0\nit\'s "fun"\t1\n')
    assert texts("a.tsv", text_field="1") == ['"so what , he said', 'quoted "whole"', 'it\'s "fun"']


def test_a_number_is_a_column_even_where_a_cell_holds_it(put: Put) -> None:
    assert texts(put("a.tsv", "good\t1\nbad\t0\n"), text_field="1") == ["good", "bad"]
    assert "no column 3" in refused("a.tsv", text_field="3")


def test_text_is_one_document_and_not_a_byte_is_touched(put: Put) -> None:
    content = "\r\n  a\r\nb\rc\x0b\u2028d\x00e \n\n"
    put("a.md", "x" * 9000 + content)
    assert texts("a.md") == ["x" * 9000 + content]


def test_split_on(put: Put) -> None:
    put("a.txt", "a\r\nb\n\n  \nc\n\n\nd <end>\ne\n<end>\n\nf")
    assert texts("a.txt", split_on="line") == ["a", "b", "  ", "c", "d <end>", "e", "<end>", "f"]
    assert [(d.text, d.line) for d in read("a.txt", split_on="blank")] == [
        ("a\r\nb", 1),
        ("c", 5),
        ("d <end>\ne\n<end>", 8),
        ("f", 12),
    ]
    assert [(d.text, d.line) for d in read("a.txt", split_on="<end>")] == [
        ("a\r\nb\n\n  \nc\n\n\nd ", 1),
        ("e", 9),
        ("f", 12),
    ]


@given(
    st.text(st.sampled_from("ab\n é字"), max_size=60),
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.sampled_from(["<>", "\n\n", "aba", "a"]),
)
def test_separators_are_found_wherever_chunks_end(text: str, sizes: list[int], separator: str) -> None:
    chunks, start = [], 0
    while start < len(text):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[start : start + size])
        start += size
    found = [document.text for document in readers._separated(iter(chunks), "a", separator)]
    assert found == [part.strip("\r\n") for part in text.split(separator) if part.strip("\r\n")]
    assert "".join(readers.split_lines(iter(chunks), "a")) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_json_values_are_found_wherever_chunks_end(value: object) -> None:
    forms = [json.dumps([value, "end"], indent=1)]
    if not isinstance(value, list):  # a list is a list of values
        forms.append(json.dumps(value) + "\n" + json.dumps("end"))
    for written in forms:
        chunks = (written[start : start + 3] for start in range(0, len(written), 3))
        assert [found for found, _ in json_values.JsonStream(chunks, "a").values()] == [value, "end"]


def test_json_values_know_their_lines(put: Put) -> None:
    put("a.json", '[\n{"text": "a"\n},\n\n{"text": "b"}]')
    assert [document.line for document in read("a.json")] == [2, 5]


# ----------------------------------------------------------------------------------------------------------------
# Long documents


def test_a_long_document_comes_in_pieces_that_are_the_document(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE", 100)
    text = "".join(f"line {number}\n" for number in range(100))
    found = read(put("a.txt", text))
    assert "".join(document.text for document in found) == text
    assert [document.final for document in found] == [False] * (len(found) - 1) + [True]
    assert all(document.text.endswith("\n") and 50 <= len(document.text) <= 100 for document in found[:-1])
    assert [text[: text.index(d.text)].count("\n") + 1 for d in found] == [d.line for d in found]


@given(st.text(st.sampled_from("a \n"), min_size=21, max_size=80), st.integers(1, 30))
def test_pieces_depend_on_the_text_alone(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", 20)
        whole = list(pieces(iter((text,))))
        assert whole == list(pieces(iter(text[start : start + size] for start in range(0, len(text), size))))
    assert "".join(piece for piece, _ in whole) == text
    assert all(len(piece) <= 20 for piece, _ in whole)


def test_the_best_place_to_cut() -> None:
    assert cut_place("aaaa bbbb\nccc ddd eee", 16) == 10
    assert cut_place("aaaa bbbb\n\nccc ddd eee", 16) == 14  # a single space is safe, the blank line is not
    assert cut_place("字" * 10 + "。" + "字" * 20, 16) == 10
    assert cut_place("字" * 30, 16) == 16


# ----------------------------------------------------------------------------------------------------------------
# What is wrong, and where


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": a}\n', "a.jsonl:2:10: is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n{"body": 1, "id": 2}\n', "a.jsonl:2: field 'text' is missing; found: 'body', 'id'"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "a.jsonl:1: its JSON is nested too deep"),
        ("a.json", '[{"text": ' + "[" * 100_000, "a.json:1:2: its JSON is nested too deep"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "a.jsonl:1: holds a number of too many digits"),
        ("a.jsonl", '{"text": NaN}', "a.jsonl:1: field 'text' holds a number"),
        ("a.jsonl", '{"text": 1e999}', "a.jsonl:1: field 'text' holds a number"),
        ("a.jsonl", '\n{"text": "\\ud800"}', "a.jsonl:2: the text holds \\ud800"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "a.jsonl:1: the key 'text' appears twice"),
        ("a.jsonl", "[1]", "a.jsonl:1: is a list"),
        ("a.jsonl", '{"text": ["a", 1]}', "a.jsonl:1: field 'text' holds a list"),
        ("a.json", '[{"text": "a"},', "a.json:1:16: is not valid JSON"),
        ("a.json", '[\n{"text": "a"}\n', "a.json:3:1: is not valid JSON: it ends inside its list"),
        ("a.json", '["a"] x', "a.json:1:7: is not valid JSON: something follows"),
        ("a.json", '["a"\n "b"]', "a.json:2:2: is not valid JSON: expecting ',' or ']'"),
        ("a.json", "[]", "a.json: no document was found"),
        ("a.csv", 'text,id\n"never closed,1\nb,2\n', "a.csv:2: is not valid CSV: a quote in this row is never closed"),
        ("a.csv", "text,id\na,1\nb,2,3\n", "a.csv:3: the row has 3 columns, the first one 2"),
        ("a.csv", "body,id\na,1\n", "a.csv:1: column 'text' is missing; found: 'body', 'id'"),
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b"ab\0cd", "a.txt: looks binary (a zero byte at 2)"),
        ("a.txt", b"%PDF-1.7 ...", "a.txt: is a PDF"),
        ("a.txt", bytes(range(1, 32)) * 9, "a.txt: looks binary"),
        ("a.txt", "日本語\n".encode() * 50 + b"a\xffb", "a.txt:51:byte 501: is not valid utf-8 (bytes ff)"),
        ("a.jsonl", b'{"text": "' + "日本語".encode() * 50 + b'\xff"}', "a.jsonl:1:byte 460: is not valid utf-8"),
        ("a.txt", "\ufeffab".encode("utf-16-le") + b"\x00", "a.txt:1:byte 6: is not valid utf-16-le"),
        ("a.parquet", b"PAR1" + bytes(50) + b"PAR1", "a.parquet: is not valid Parquet"),
    ],
)
def test_bad_content_is_one_line_that_says_where(put: Put, name: str, content: bytes | str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert message in refused(put(name, content))


def test_what_is_legal_is_read(put: Put) -> None:
    assert texts(put("a.jsonl", '\ufeff{"text": "a\\u0000b\\r\\n", "x": NaN, "y": null}\r\n')) == ["a\0b\r\n"]
    assert texts(put("b.jsonl", '{"text": null}\n{"text": "x"}')) == ["", "x"]
    assert texts(put("c.csv", 'text\n"a\0b"\n')) == ["a\0b"]


def test_long_things_are_refused_before_they_fill_the_memory(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "LONGEST", 1000)
    monkeypatch.setattr(tables, "LONGEST_CELL", 1000)
    monkeypatch.setattr(tables, "LONGEST_ROW", 2000)
    assert "a.jsonl:2: the line is longer" in refused(put("a.jsonl", '{"text": "a"}\n"' + "a" * 3_000_000))
    assert "a.json:1:2: is not valid JSON: a value longer" in refused(put("a.json", '["' + "a" * 3_000_000))
    assert "a.csv:2: is not valid CSV: a quote" in refused(put("a.csv", 'text\n"' + "a\n" * 100_000))
    assert "a.csv:1: the row is longer" in refused(put("a.csv", ('"' + "a" * 500 + '\n",') * 10))
    assert "no blank line within" in refused(put("a.txt", "a\n" * 1_000_000), split_on="blank")
    assert "no '<end>' within" in refused("a.txt", split_on="<end>")


def test_an_unmatched_quote_over_a_long_file_stays_small(tmp_path: Path) -> None:
    with open(tmp_path / "a.csv", "w") as file:
        file.write('text\n"')
        for _ in range(50):
            file.write("a line of text that goes on and on\n" * 20_000)
    assert peak_memory(tmp_path / "a.csv") < 300e6


def peak_memory(path: Path) -> float:
    """Peak resident bytes of a process that reads a file, whatever comes of it."""
    code = (
        "import sys\n"
        "from llmcli.config import TextConfig\n"
        "from llmcli.data.readers import read_documents\n"
        "try:\n"
        "    for _ in read_documents([sys.argv[1]], TextConfig()): pass\n"
        "except Exception as error: print(error, file=sys.stderr)\n"
        "status = open('/proc/self/status').read()\n"  # ru_maxrss would tell the parent's, too
        "print(int(status.split('VmHWM:')[1].split()[0]) * 1024)"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    return float(done.stdout)


def test_a_long_text_is_read_in_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(50):
            file.write("a line of text that goes on\n" * 36_000)
    assert peak_memory(tmp_path / "a.txt") < 60e6


# ----------------------------------------------------------------------------------------------------------------
# Compression


def compressions() -> list[Callable[[bytes], bytes]]:
    found: list[Callable[[bytes], bytes]] = [gzip.compress, lzma.compress]
    try:
        import zstandard
    except ImportError:
        return found
    return [*found, zstandard.compress]


SAMPLE = "".join(f"{number * 7919 % 10007} and so on\n" for number in range(3000)).encode()


@pytest.mark.parametrize("compress", compressions())
def test_a_compressed_file_that_is_not_whole_is_an_error_wherever_it_ends(
    put: Put, compress: Callable[[bytes], bytes]
) -> None:
    data = compress(SAMPLE)
    assert "".join(texts(put("a.txt", data))) == SAMPLE.decode()
    for end in (*range(6, 40, 3), len(data) // 2, len(data) - 9, len(data) - 4, len(data) - 1):
        assert refused(put("a.gz", data[:end])).startswith("a.gz: ")
    assert "something else follows" in refused(put("a.gz", data + b"garbage"))
    assert texts(put("a.gz", data + data)) == [(SAMPLE + SAMPLE).decode()]
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    put("a.gz", bytes(damaged))
    if compress in (gzip.compress, lzma.compress):  # zstd has no checksum unless it is asked for
        assert refused("a.gz").startswith("a.gz: ")


@pytest.mark.parametrize("compress", compressions())
def test_a_bomb_is_refused(put: Put, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]) -> None:
    monkeypatch.setattr(formats, "BOMB_FLOOR", 1 << 20)
    assert "swells to more than 200 times" in refused(put("a.txt", compress(b"a" * 8_000_000)))


# ----------------------------------------------------------------------------------------------------------------
# Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_unicode_is_told_by_its_mark(put: Put, encoding: str) -> None:
    assert texts(put("a.txt", "grün 字 🙂\n".encode(encoding))) == ["grün 字 🙂\n"]
    assert texts("a.txt", encoding="utf-16" if encoding == "utf-16" else "auto") == ["grün 字 🙂\n"]


def test_a_character_that_lies_across_chunks(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "CHUNK", 7)
    monkeypatch.setattr(encodings, "SAMPLE", 10)
    text = "aé字🙂" * 20
    assert texts(put("a.txt", text)) == [text]
    put("b.txt", text.encode() + b"\n\xff")
    assert f"b.txt:2:byte {len(text.encode()) + 1}: " in refused("b.txt")
    log = ReadLog()
    found = list(read_documents(["b.txt"], TextConfig(errors="replace"), log=log))
    assert found[0].text == text + "\n\ufffd"
    assert log.sources[0].replaced == 1


def test_western_bytes_among_ascii_are_cp1252(put: Put) -> None:
    put("a.txt", ("plain words " * 30 + "“café”").encode("cp1252"))
    assert texts("a.txt")[0].endswith("“café”")
    assert "is not valid utf-8" in refused("a.txt", encoding="utf-8")
    with pytest.raises(ConfigError, match="no encoding 'klingon'"):
        read("a.txt", encoding="klingon")


@needs_data
@pytest.mark.parametrize("text", ["grüße\n", "café\n", "naïve\nÜbung\n"])
def test_a_few_words_of_a_western_encoding_are_no_utf_16_and_no_urdu(put: Put, text: str) -> None:
    put("a.txt", text.encode("cp1252"))
    assert texts("a.txt") == [text]


def test_too_few_words_of_an_old_encoding_are_an_error_and_not_guessed(put: Put) -> None:
    put("a.txt", "Привет\n".encode("cp1251"))
    with pytest.raises(DataError, match="too little text to tell its encoding; save it as UTF-8"):
        texts("a.txt")
    assert texts("a.txt", encoding="cp1251") == ["Привет\n"]


def test_old_encodings_are_recognised() -> None:
    pytest.importorskip("charset_normalizer")
    folder = DATA / "udhr_legacy_encodings"
    for name, words in {
        "Chinese_Mandarin-GB2312": "世界人权宣言",
        "Japanese_Nihongo-SJIS": "世界人権宣言",
        "Japanese_Nihongo-EUC": "世界人権宣言",
        "Russian-Cyrillic": "декларация",
        "Greek_Ellinika-Greek": "διακήρυξη",
        "German_Deutsch-Latin1": "Menschenwürde",
    }.items():
        text = texts(str(folder / name))[0]
        if name != "German_Deutsch-Latin1":
            assert words.casefold() in re.sub(r"\s", "", text).casefold(), name
        else:
            assert "für" in text
    log = ReadLog()
    assert len(list(read_documents([str(DATA / "state_union")], TextConfig(), log=log))) == 66
    assert {source.encoding for source in log.sources} == {"utf-8", "cp1252"}


# ----------------------------------------------------------------------------------------------------------------
# Inputs


def test_folders_globs_and_names_are_found_once_and_in_order(put: Put) -> None:
    for name in ("b/2.txt", "b/1.txt", "b/.hidden", "b/.git/x", "a.txt", "b/c/3.txt"):
        put(name, name)
    put("b/picture.png", b"\x89PNG\0\0")
    put("b/empty.txt", b"")
    log = ReadLog()
    found = read_documents(["b", "a.txt", "b/1.txt", "*.txt"], TextConfig(), log=log)
    assert [document.text for document in found] == ["b/1.txt", "b/2.txt", "b/c/3.txt", "a.txt"]
    assert [line.split(":")[0] for line in log.skipped] == ["b/empty.txt", "b/picture.png"]
    assert texts("b/**/*.txt") == ["b/1.txt", "b/2.txt", "b/c/3.txt"]
    os.link("a.txt", "same.txt")
    assert [source.name for source in find_inputs(["a.txt", "same.txt"])] == ["a.txt"]


def test_missing_inputs(put: Put) -> None:
    put("only/picture.png", b"\x89PNG\0\0")
    Path("empty").mkdir()
    assert "nothing.txt: no such file or folder" in refused("nothing.txt")
    assert "*.nothing: matches no file" in refused("*.nothing")
    assert "empty: holds no file" in refused("empty")
    assert "no text was found; 1 files were skipped, the first: only/picture.png: looks binary" in refused("only")
    with pytest.raises(UsageError):
        read("a\0b")
    assert "/dev/zero: is neither a file" in refused("/dev/zero")


def test_a_pipe_is_read_and_one_without_a_writer_is_refused(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PIPE_PATIENCE", 200)
    os.mkfifo("pipe")
    assert "a pipe that nobody writes to" in refused("pipe")
    monkeypatch.setattr(formats, "_PIPE_PATIENCE", 10_000)
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(gzip.compress(JSONL.encode())))
    writer.start()
    assert texts("pipe") == WANTED
    writer.join()


def test_problems_are_collected_where_they_are_asked_for(put: Put) -> None:
    put("a.jsonl", '{"text": "a"}\n{"text": 1}\nx\n{"text": "b"}\n')
    put("b.csv", "text,id\na,1\nb\nc,2\n")
    put("c.gz", gzip.compress(SAMPLE)[:-9])
    problems: list[str] = []
    log = ReadLog(on_problem=lambda error: problems.append(str(error)))
    found = list(read_documents(["a.jsonl", "b.csv", "c.gz"], TextConfig(), log=log))
    assert [document.text for document in found][:4] == ["a", "b", "a", "c"]
    assert [problem.split(": ")[0] for problem in problems] == ["a.jsonl:2", "a.jsonl:3:1", "b.csv:3", "c.gz"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet"])
@given(content=st.binary(max_size=200))
def test_any_bytes_end_in_documents_or_in_one_line(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            for document in read_documents([str(path)], TextConfig(text_field="1" if name[-2:] == "sv" else "text")):
                document.text.encode()
