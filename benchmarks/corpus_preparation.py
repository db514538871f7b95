"""Corpus preparation: `data prepare` against `tokenizers`' own `encode_batch_fast` on the same text (bar: 2 x).

Both run in turn, each in processes of its own, on the cores of this process. Of `tokenizers` only the encoding is
timed, from texts in memory; of llmcli reading, encoding and writing. Memory is the sum over llmcli's processes.
With --gigabyte a file of 1 GB is made and prepared once, for its memory (bar: 1 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BAR, MEMORY_BAR = 2.0, 10**9
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = 8192

PEER = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = open(sys.argv[2], encoding="utf-8", newline="").read().split(sys.argv[3])
began = time.perf_counter()
tokens = sum(len(found.ids) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}))
"""
OURS = "import sys; from llmcli.cli.main import run; run()"
SEPARATOR = "<|document|>"


def documents() -> Iterator[str]:
    """Real text: the shared sets where they are, and Python's own library."""
    for pattern in ("wiki_demo/*.txt", "wikitext-2/*.txt", "tinyshakespeare/*.txt", "state_union/*.txt"):
        for path in sorted(DATA.glob(pattern)):
            text = path.read_text("utf-8", "replace")
            yield from (text[start : start + 5000] for start in range(0, len(text), 5000))
    for path in sorted((DATA / "c4_demo").glob("*.jsonl")):
        yield from (json.loads(line)["text"] for line in path.read_text("utf-8").splitlines())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text("utf-8", "replace")


def make_text(path: Path, size: int) -> int:
    """Writes about `size` bytes of the documents, over and over. Returns the bytes."""
    written, found = 0, list(documents())
    with open(path, "w", encoding="utf-8", newline="") as file:
        while written < size:
            for text in found:
                written += len(text.encode()) + len(SEPARATOR)
                file.write(text + SEPARATOR)
                if written >= size:
                    break
    return path.stat().st_size


def memory_of(process: int) -> int:
    """Resident bytes of a process and its descendants (proportional: shared pages are counted once)."""
    total, waiting = 0, [process]
    while waiting:
        current = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{current}/task/{current}/children").read_text().split())
            for line in Path(f"/proc/{current}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:  # it has just ended
            continue
    return total


def run(words: list[str]) -> tuple[dict[str, object], int]:
    """(the JSON on stdout, peak memory of all processes)."""
    root = str(Path(__file__).resolve().parents[1])
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": root}
    ) as process:
        peak, done = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        done.set()
        watcher.join()
    if process.returncode:
        sys.exit(f"{words[:3]} failed with {process.returncode}")
    return json.loads(output), peak


def train_tokenizer(text: Path, folder: Path) -> None:
    """Byte-level BPE of 8,192 tokens, by the library itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


def ours(text: Path, place: Path, separator: str = SEPARATOR) -> list[str]:
    """The command that prepares the text."""
    words = ["data", "prepare", str(text), "-t", str(place / "tokenizer"), "-o", str(place / "corpus"), "--overwrite"]
    return [sys.executable, "-c", OURS, *words, "--split-on", separator, "--json"]


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=60, help="size of the text")
    parser.add_argument("--gigabyte", action="store_true", help="prepare 1 GB once, for its memory")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        text = place / "text.txt"
        size = make_text(text, (1000 if options.gigabyte else options.megabytes) * 10**6)
        train_tokenizer(make_sample(place), place / "tokenizer")
        (one_gigabyte if options.gigabyte else compare)(text, size, place, options.rounds)


def make_sample(place: Path) -> Path:
    """All documents once, for the tokenizer."""
    sample = place / "sample.txt"
    sample.write_text("\n".join(documents()), encoding="utf-8")
    return sample


def compare(text: Path, size: int, place: Path, rounds: int) -> None:
    """Both, alternated."""
    peer = [sys.executable, "-c", PEER, str(place / "tokenizer" / "tokenizer.json"), str(text), SEPARATOR]
    rates: dict[str, list[float]] = {"tokenizers": [], "llmcli": [], "llmcli, whole command": []}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        found, peaks["tokenizers"] = run(peer)
        rates["tokenizers"].append(size / float(str(found["seconds"])) / 1e6)
        began = time.perf_counter()
        report, peaks["llmcli"] = run(ours(text, place))
        rates["llmcli, whole command"].append(size / (time.perf_counter() - began) / 1e6)
        rates["llmcli"].append(size / float(str(report["seconds"])) / 1e6)
    peaks["llmcli, whole command"] = peaks["llmcli"]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{'':<22} {'MB/s':>7} {'lowest':>7} {'highest':>8} {'memory MB':>10}   ({size / 1e6:.0f} MB)")
    for name, found in rates.items():
        print(f"{name:<22} {medians[name]:>7.1f} {min(found):>7.1f} {max(found):>8.1f} {peaks[name] / 1e6:>10.0f}")
    ratio = medians["llmcli"] / medians["tokenizers"]
    facts = {"benchmark": "corpus_preparation", "bytes": size, "megabytes_per_second": medians, "memory": peaks}
    print(json.dumps({**facts, "ratio": ratio, "bar": BAR, "ok": ratio >= BAR}))
    sys.exit(0 if ratio >= BAR else 1)


def one_gigabyte(text: Path, size: int, place: Path, _rounds: int) -> None:
    """The memory of 1 GB as many documents, and as one."""
    ok = True
    for name, separator in (("many documents", SEPARATOR), ("one document", "file")):
        report, peak = run(ours(text, place, separator))
        rate = size / float(str(report["seconds"])) / 1e6
        print(f"{name}: {size / 1e6:.0f} MB, {rate:.1f} MB/s, peak memory {peak / 1e6:.0f} MB")
        ok = ok and peak < MEMORY_BAR
    print(json.dumps({"benchmark": "corpus_preparation_gigabyte", "bytes": size, "bar": MEMORY_BAR, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
