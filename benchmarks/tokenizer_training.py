"""Tokenizer training: `tokenizer train` against the tokenizers library's own trainer on the same file (bar: 0.9 x).

Both train a byte-level BPE of 8,192 tokens, in turn, each as a whole process from its start to its end, so llmcli pays
for its imports, its worker processes and the writing of its files. Memory is the sum over a process and its children,
shared pages counted in each (bar: 1.5 GB). The library's loop over GPT-2's pattern is its fastest; llmcli uses its
default pattern. `--chinese` measures a file of Chinese characters instead, on which the pattern without cuts blows up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BAR, MEMORY_BAR = 0.9, 1.5e9
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SIZE = 8192

LIBRARY = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(
    vocab_size=int(sys.argv[3]), special_tokens=["<|endoftext|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
tokenizer.train([sys.argv[1]], trainer)
tokenizer.save(sys.argv[2])
"""


def parts(chinese: bool) -> Iterator[str]:
    """Real text: the shared sets where they are, else Python's own library."""
    names = ("wiki_demo/*.txt", "wikitext-2/*.txt", "tinyshakespeare/*.txt", "state_union/*.txt", "c4_demo/*.jsonl")
    for pattern in ("chinese_poetry/*.json",) if chinese else names:
        for path in sorted(DATA.glob(pattern)):
            yield path.read_text("utf-8", "replace")
    if not DATA.is_dir() and not chinese:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            yield path.read_text("utf-8", "replace")
    if chinese:  # ever new clauses, of characters as frequent as real ones
        generator = random.Random(0)
        while True:
            clause = (chr(0x4E00 + int(3500 * generator.random() ** 4)) for _ in range(generator.randrange(4, 30)))
            yield "".join(clause) + generator.choice("，，。")


def make_text(path: Path, size: int, chinese: bool) -> int:
    """Writes about `size` bytes: the parts, over and over. Returns the bytes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        while file.tell() < size:
            for part in parts(chinese):
                file.write(part + ("" if chinese else "\n"))
                if chinese and file.tell() >= size:
                    break
    return path.stat().st_size


def memory_of(process: int) -> int:
    """Resident bytes of a process and its descendants."""
    total, waiting = 0, [process]
    while waiting:
        current = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{current}/task/{current}/children").read_text().split())
            total += int(Path(f"/proc/{current}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it has just ended
            continue
    return total


def run(words: list[str]) -> tuple[float, int]:
    """(seconds, peak memory of all processes) of a command."""
    peak, done = 0, threading.Event()
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    if process.returncode:
        sys.exit(f"{words[:4]} failed with {process.returncode}")
    return seconds, peak


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the text")
    parser.add_argument("--text", type=Path, help="a file to train on instead")
    parser.add_argument("--chinese", action="store_true", help="train on Chinese characters, llmcli alone")
    parser.add_argument("--vocab-size", type=int, default=SIZE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text = options.text or Path(name) / "text.txt"
        size = text.stat().st_size if options.text else make_text(text, options.megabytes * 10**6, options.chinese)
        command = ["tokenizer", "train", str(text), "-o", f"{name}/ours", "--vocab-size", str(options.vocab_size)]
        ours = [sys.executable, "-m", "llmcli", *command, "--overwrite", "--quiet"]
        library = [sys.executable, "-c", LIBRARY, str(text), f"{name}/library.json", str(options.vocab_size)]
        jobs = {"llmcli": ours} if options.chinese else {"tokenizers": library, "llmcli": ours}
        found: dict[str, list[tuple[float, int]]] = {job: [] for job in jobs}
        for _ in range(options.rounds):
            for job, words in jobs.items():
                found[job].append(run(words))
    report(found, size)


def report(found: dict[str, list[tuple[float, int]]], size: int) -> None:
    """The table, the ratio and the verdict."""
    print(f"{size / 1e6:.1f} MB, {os.cpu_count()} cores")
    print(f"{'':<12} {'s median':>9} {'(min-max)':>15} {'MB/s':>7} {'peak MB':>8}")
    medians, peaks = {}, {}
    for job, measured in found.items():
        seconds = [second for second, _ in measured]
        medians[job], peaks[job] = statistics.median(seconds), max(peak for _, peak in measured)
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        rate = size / 1e6 / medians[job]
        print(f"{job:<12} {medians[job]:>9.2f} {spread:>15} {rate:>7.1f} {peaks[job] / 1e6:>8.0f}")
    ratio = medians["tokenizers"] / medians["llmcli"] if "tokenizers" in medians else None
    ok = (ratio is None or ratio >= BAR) and peaks["llmcli"] <= MEMORY_BAR
    print(json.dumps({"benchmark": "tokenizer_training", "seconds": medians, "peak": peaks, "ratio": ratio, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
