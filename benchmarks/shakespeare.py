"""Tiny Shakespeare: bits per byte on the last tenth after 9 s and after 60 s of training, by `llmcli pretrain`.

Characters, context 64, at most 0.81 M parameters: the setting of nanoGPT's README for a CPU, which gives 1.886 nats a
character (2.72 bits per byte) after 2,000 steps. The time is that of training: the budget of the command, in which the
one validation, at the end, is not counted. Bars: 2.72 within 9 s, 2.40 within 60 s. The runs alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ["--kind", "char", "--context", "64", "--hidden-size", "128", "--heads", "4", "--ffn-size", "344"]
COMMON += ["--no-tie-embeddings", "--embedding-learning-rate", "0.02", "--val-fraction", "0.1", "--val-by", "tail"]
COMMON += ["--eval-every", "1000000", "--eval-tokens", "1000000", "--precision", "bfloat16", "--warmup-steps", "10"]
BUDGETS = {
    9: (2.72, ["--layers", "2", "--batch-size", "12", "--lr", "0.04"]),
    60: (2.40, ["--layers", "4", "--batch-size", "24", "--lr", "0.03"]),
}


def train(text: str, run: Path, seconds: int, seed: int, extra: list[str]) -> dict[str, float]:
    """One run; its figures."""
    words = [sys.executable, "-m", "llmcli", "pretrain", text, "-o", str(run), "--overwrite", "--json", *COMMON, *extra]
    words += ["--max-seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    validation = next(event for event in events if event["event"] == "validation")
    return {
        "bits_per_byte": validation["bits_per_byte"],
        "nats": validation["loss"],
        "steps": validation["step"],
        "training_seconds": steps[-1]["elapsed_seconds"],
    }


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 above a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="../shared/data/tinyshakespeare/input.txt", help="tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not Path(options.text).is_file():
        print(f"left out: {options.text} is not there; name tiny Shakespeare with --text")
        return
    found: dict[int, list[dict[str, float]]] = {seconds: [] for seconds in BUDGETS}
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.rounds):
            for seconds, (_, extra) in BUDGETS.items():
                found[seconds].append(train(options.text, Path(place, "run"), seconds, number, extra))
    good = True
    print(f"{'seconds':>7} {'bits/byte':>9} {'min':>7} {'max':>7} {'bar':>5} {'nats':>7} {'steps':>6} {'trained s':>9}")
    for seconds, (bar, _) in BUDGETS.items():
        bits = [run["bits_per_byte"] for run in found[seconds]]
        middle = {key: statistics.median(run[key] for run in found[seconds]) for key in found[seconds][0]}
        good &= middle["bits_per_byte"] <= bar
        print(
            f"{seconds:>7} {middle['bits_per_byte']:>9.4f} {min(bits):>7.4f} {max(bits):>7.4f} {bar:>5.2f} "
            f"{middle['nats']:>7.4f} {middle['steps']:>6.0f} {middle['training_seconds']:>9.2f}"
        )
    print(json.dumps({"benchmark": "shakespeare", "runs": {str(key): value for key, value in found.items()}}))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
