"""Start-up: `llmcli --help` against `python -c "import click"`, alternated, medians and their ratio (bar: 1.5)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BAR = 1.5


def seconds(words: list[str], environment: dict[str, str]) -> float:
    """Wall-clock seconds of one process."""
    began = time.perf_counter()
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 above the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="how often each is started")
    rounds = parser.parse_args().rounds
    command = shutil.which("llmcli", path=str(Path(sys.executable).parent)) or "llmcli"
    jobs = {
        "import click": [sys.executable, "-c", "import click"],
        "llmcli --help": [command, "--help"],
        "llmcli info --help": [command, "info", "--help"],
    }
    # Bytecode is written as it is for every installed command; without it Python compiles on each start.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for words in jobs.values():
        seconds(words, environment)
    for _ in range(rounds):
        for name, words in jobs.items():
            times[name].append(seconds(words, environment))
    medians = {name: statistics.median(found) for name, found in times.items()}
    base = medians["import click"]
    print(f"{'command':<20} {'median ms':>10} {'best ms':>9} {'ratio':>7}")
    for name, median in medians.items():
        print(f"{name:<20} {1000 * median:>10.1f} {1000 * min(times[name]):>9.1f} {median / base:>7.2f}")
    ratio = medians["llmcli --help"] / base
    print(json.dumps({"benchmark": "startup", "seconds": medians, "ratio": ratio, "bar": BAR, "ok": ratio <= BAR}))
    sys.exit(0 if ratio <= BAR else 1)


if __name__ == "__main__":
    main()
