"""SIGKILL at any moment of a run's life: no checkpoint that stands is ever damaged, and no bit of the result is lost.

Each life is killed by chance: some time after its start, some lines of its metrics later, or while it has something
half-written on the disk; the next one goes on with `--resume auto`. A failure comes back with the seed that it prints.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from forked import Life, run, until
from small_run import fingerprint, metrics, text, tree, words

from llmcli.files.artefacts import read_metrics
from llmcli.files.manifest import manifest_problems
from llmcli.operations.verify import verify

COMMAND = ["pretrain", "text.txt", "-o", "run", "--resume", "auto"]
LENGTH = words(max_steps=60, eval_every=3, save_every=2, vocab_size=300)


def half_written(place: Path) -> list[str]:
    """What lies in the run under a name that is not final."""
    try:
        return [path.name for path in (place / "run").rglob(".*.tmp-*")]
    except OSError:  # it went away while it was looked at
        return []


def live(place: Path, chance: random.Random) -> str:
    """One life, killed at a moment of chance. Returns where: the kind of moment and what was half-written then."""
    before = set(half_written(place))
    lines = len(metrics(place / "run"))
    kind = chance.choice(("time", "line", "write"))
    wait, count = chance.random(), chance.randrange(1, 20)
    life = Life(*COMMAND, *LENGTH, cwd=place)
    if kind == "time":
        time.sleep(wait)
    elif kind == "line":  # the metrics are cut back at the start, so the count may be reached late or never
        until(lambda: len(metrics(place / "run")) >= lines + count or not life.alive)
        time.sleep(wait * 0.02)
    else:
        seen, names = chance.randrange(1, 12), set[str]()
        while len(names) < seen and life.alive:
            names.update(set(half_written(place)) - before)
        time.sleep(max(0.0, wait - 0.5) * 0.01)
    life.signal(signal.SIGKILL)
    code = life.wait()
    assert code in (0, -signal.SIGKILL), life.stderr
    if code == 0:
        return "ended"
    found = {name[1:].split(".tmp-")[0].rstrip("0123456789") for name in set(half_written(place)) - before}
    return f"{kind}: {', '.join(sorted(found)) or 'nothing half-written'}"


def check(place: Path) -> None:
    """What must hold after every kill: all that stands under its final name is whole."""
    at = place / "run"
    for folder in (*(at / "checkpoints").glob("step-*"), *at.glob("model"), *at.glob("tokenizer"), *at.glob("corpus")):
        if folder.name != "tokenizer":
            assert manifest_problems(folder) == []
        assert verify(folder).problems == ()
    if (at / "metrics.jsonl").exists():
        steps = [record["step"] for record in read_metrics(at)]
        assert steps == sorted(steps)


def survive(place: Path, seed: int, kills: int) -> Counter[str]:
    """Lives and dies until it was killed so often, each time that the run ends from the beginning; counts where."""
    print(f"seed {seed}")
    (place / "text.txt").write_text(text())
    run(*COMMAND, *LENGTH, cwd=place)
    expected = fingerprint(place / "run")
    names = set(tree(place / "run"))
    shutil.rmtree(place / "run")
    chance, moments = random.Random(seed), Counter[str]()
    died = 0
    while died < kills:
        moment = live(place, chance)
        moments[moment] += 1
        check(place)
        if moment == "ended":
            assert ended(place, names) == expected
            shutil.rmtree(place / "run")
        else:
            died += 1
    run(*COMMAND, *LENGTH, cwd=place)
    assert ended(place, names) == expected
    print(*(f"{count:4} {moment}" for moment, count in moments.most_common()), sep="\n")
    return moments


def ended(place: Path, names: set[str]) -> dict[str, Any]:
    """The fingerprint of a run that has ended, of which nothing half-written may be left."""
    assert set(tree(place / "run")) == names
    assert [line["event"] for line in metrics(place / "run")].count("end") == 1
    return fingerprint(place / "run")


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    place = tmp_path / "here"
    place.mkdir()
    survive(place, seed=1, kills=10)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    place = tmp_path / "here"
    place.mkdir()
    moments = survive(place, seed=random.SystemRandom().randrange(2**32), kills=200)
    # It was killed in the middle of each thing that it writes, or the test proves little.
    for name in ("step-", "model", "corpus"):
        assert any(name in moment for moment in moments), moments
