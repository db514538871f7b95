"""Batches: tokens/s of 16 rows against one, the median of alternated rounds (bars: int4 3.8, int8 6).

`decode`: rows of one length grow together, as `llmcli bench` measures. `file`: prompts of unequal length are continued
greedily by unequal counts of tokens, as `generate --input` does it, with the time to read prompts and choose tokens.
Without --model: models of random weights in the shape of SmolLM (135 M), in int4, in int8, and in int8 with
--quantizer weight-only. A row's text is what it is alone in all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from decode import write_model, write_onnx

from llmcli.config import SamplingConfig
from llmcli.data.cores import available_cores
from llmcli.runtime.decoding import Row, decode
from llmcli.runtime.open import open_session
from llmcli.runtime.sampling import Sampler
from llmcli.runtime.session import Session

BATCH, PROMPT, NEW = 16, 128, 64
BARS = {"int4": 3.8, "int8": 6.0, "int8 weights": 6.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A folder, and how it is opened."""

    name: str
    folder: Path


def decoding(session: Session, rows: int) -> float:
    """Tokens/s of rows that grow by a token each step, after prompts of one length."""
    chosen = random.Random(0)
    session.start([[chosen.randrange(session.vocab_size) for _ in range(PROMPT)]] * rows)
    fed = np.random.default_rng(0).integers(0, session.vocab_size, (NEW, rows, 1))
    began = time.perf_counter()
    for ids in fed:
        session.feed(ids)
    return rows * NEW / (time.perf_counter() - began)


def continuing(session: Session, rows: int, prompts: int) -> float:
    """New tokens/s of a file of prompts, as many side by side as there are rows."""
    chosen = random.Random(0)
    asked = []
    for _ in range(prompts):
        ids = [chosen.randrange(session.vocab_size) for _ in range(chosen.randrange(8, 65))]
        asked.append(Row(ids, Sampler(SamplingConfig(temperature=0)), chosen.randrange(16, 129)))
    began = time.perf_counter()
    for _ in decode(session, asked, width=rows):
        pass
    return sum(len(row.ids) for row in asked) / (time.perf_counter() - began)


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX folder to measure in place of the random ones")
    parser.add_argument("--bar", type=float, default=0.0, help="for --model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32, help="of `file`, at 16 rows; a quarter of them at one row")
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.model:
            cases = [Case(str(options.model), options.model)]
        else:
            model = write_model(Path(place) / "135m", "135m")
            cases = [
                Case("int4", write_onnx(model, "int4")),
                Case("int8", write_onnx(model, "int8")),
                Case("int8 weights", write_onnx(model, "int8", quantizer="weight-only")),
            ]
        results = []
        head = f"{'model':<14} {'test':<7} {'1 row':>9} {f'{BATCH} rows':>9}"
        print(f"{head} {'ratio':>6} {'least':>6} {'most':>6} {'bar':>5}")
        for case in cases:
            session = open_session(case.folder, threads=options.threads)
            found: dict[str, list[tuple[float, float]]] = {"decode": [], "file": []}
            for _ in range(options.rounds + 1):
                found["decode"].append((decoding(session, 1), decoding(session, BATCH)))
                alone = continuing(session, 1, max(options.prompts // 4, 1))
                found["file"].append((alone, continuing(session, BATCH, options.prompts)))
            session.close()
            for test, pairs in found.items():
                ratios = [many / one for one, many in pairs[1:]]  # the first round makes ready
                ratio = statistics.median(ratios)
                one, many = (statistics.median(pair[place] for pair in pairs[1:]) for place in (0, 1))
                bar = BARS.get(case.name, options.bar) if test == "decode" else 0.0
                print(
                    f"{case.name:<14.14} {test:<7} {one:>9,.1f} {many:>9,.1f} {ratio:>6.2f} {min(ratios):>6.2f} "
                    f"{max(ratios):>6.2f} {bar:>5.1f}",
                    flush=True,
                )
                results.append({"model": case.name, "test": test, "one": one, "many": many, "ratio": ratio, "bar": bar})
    ok = all(float(str(item["ratio"])) >= float(str(item["bar"])) for item in results)
    print(json.dumps({"benchmark": "batching", "rows": BATCH, "runs": results, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
