"""Speculation: tokens/s with guesses against without, alternated, on texts that quote and on others (bars: 1.8, 0.95).

A small model copies nothing by itself, so the texts of "edit" and "other" are given: the sampler does all its work and
then takes the given token. "drawn" and "greedy" are the model's own; what a greedy text repeats is the model's affair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics

from llmcli.config import SamplingConfig, SpeculationConfig
from llmcli.operations.generate import Generator, open_generator
from llmcli.runtime.decoding import Row, Token, decode
from llmcli.runtime.sampling import Choice, Sampler, Vector

QUOTES, ELSEWHERE = 1.8, 0.95
BARS = {"edit": QUOTES, "other": ELSEWHERE, "drawn": ELSEWHERE, "greedy": None}
GREEDY, DRAWN = SamplingConfig(temperature=0), SamplingConfig(temperature=1.0, top_p=1.0)


class Follower(Sampler):
    """Takes the tokens of a text that is given."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(GREEDY)
        self._ids = iter(ids)

    def choose(self, logits: Vector, *, top: int | None = None) -> Choice:
        super().choose(logits, top=top)
        return Choice(next(self._ids), 0.0)

    def is_close(self, logits: Vector, error: float) -> bool:
        """A model that wrote this text by itself would be sure of it."""
        super().is_close(logits, error)
        return False

    def fork(self) -> Sampler:
        """A draft model guesses by itself."""
        return Sampler(GREEDY)


def edited(text: str) -> str:
    """The text with every 25th word put otherwise."""
    words = text.split(" ")
    return " ".join("(changed)" if place % 25 == 24 else word for place, word in enumerate(words))


def rows(generator: Generator, prompt: int, tokens: int) -> dict[str, Callable[[int], Row]]:
    """By name: what makes a row for a round."""
    encode, size = generator.tokenizer.encode, generator.tokenizer.vocab_size
    document, other = topics["assignment"], topics["exceptions"] + topics["import"]
    ids = encode(document)[:prompt]
    given = {"edit": encode(edited(document))[:tokens], "other": encode(other)[:tokens]}
    samplings = {"drawn": DRAWN, "greedy": GREEDY}

    def maker(name: str) -> Callable[[int], Row]:
        def make(turn: int) -> Row:
            sampler = Follower(given[name]) if name in given else Sampler(samplings[name], seed=turn)
            return Row(ids, sampler, tokens, vocab_size=size)

        return make

    return {name: maker(name) for name in BARS}


def speed(generator: Generator, row: Row, guess: bool) -> float:
    """Tokens/s of decoding, the first token left out, as the prompt is read before it."""
    events = generator.decode([row]) if guess else decode(generator.session, [row])
    times = [time.perf_counter() for event in events if isinstance(event, Token)]
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", help="a model folder or run; without one nothing is measured")
    parser.add_argument("--draft-model", help="in place of prompt lookup")
    parser.add_argument("--prompt", type=int, default=250, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=200, help="that are decoded each time")
    parser.add_argument("--rounds", type=int, default=9, help="of each pair")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.model is None:
        print("skipped: name a model with -m")
        return
    speculation = SpeculationConfig(lookup=options.draft_model is None, draft_model=options.draft_model)
    generator = open_generator(options.model, threads=options.threads, speculation=speculation)
    results = []
    print(f"{'text':<8} {'without':>9} {'with':>9} {'ratio':>7} {'drafted':>8} {'accepted':>9} {'bar':>5}")
    for name, make in rows(generator, options.prompt, options.tokens).items():
        pairs, drafted, accepted = [], 0, 0
        for turn in range(options.rounds + 1):  # the first pair warms up
            found = {}
            for guess in (False, True) if turn % 2 else (True, False):
                row = make(turn)
                found[guess] = speed(generator, row, guess)
                drafted, accepted = drafted + row.drafted, accepted + row.accepted
            pairs += [found] if turn else []
        without, guessed = (statistics.median(pair[guess] for pair in pairs) for guess in (False, True))
        ratio = statistics.median(pair[True] / pair[False] for pair in pairs)
        bar = BARS[name]
        print(f"{name:<8} {without:>9.1f} {guessed:>9.1f} {ratio:>7.3f} {drafted:>8} {accepted:>9} {bar or '':>5}")
        counts = {"drafted": drafted, "accepted": accepted}
        results.append({"text": name, "without": without, "with": guessed, "ratio": ratio, "bar": bar, **counts})
    ok = all(result["ratio"] >= result["bar"] for result in results if result["bar"])
    print(json.dumps({"benchmark": "speculation", "model": options.model, "runs": results, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
