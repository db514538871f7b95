"""Constrained output: tokens/s of decoding under a schema and an expression against without, alternated (bar: 0.9)."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from llmcli.config import SamplingConfig
from llmcli.operations.constraints import Constraint
from llmcli.operations.generate import Generator, open_generator
from llmcli.runtime.constraint import Grammar
from llmcli.runtime.decoding import Row, Token, decode
from llmcli.runtime.sampling import Sampler

BAR = 0.9
# Neither lets a text end before the tokens that are counted.
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "note": {"type": "string"}},
    "required": ["name", "age", "note"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "schema": Constraint("json-schema", json.dumps({"type": "array", "items": PERSON, "minItems": 10_000}), "schema"),
    "regex": Constraint("regex", "([A-Z][a-z]{0,20}[ ,.]){5000}", "regex"),
}
SAMPLINGS = {"greedy": SamplingConfig(temperature=0), "drawn": SamplingConfig()}


def speed(
    generator: Generator, ids: list[int], tokens: int, sampling: SamplingConfig, grammar: Grammar | None
) -> float:
    """Tokens/s of decoding, the first token left out, as the prompt is read before it."""
    sampler = Sampler(sampling, seed=0, matcher=grammar and grammar.matcher())
    row = Row(ids, sampler, tokens, vocab_size=generator.tokenizer.vocab_size)
    times = [time.perf_counter() for event in decode(generator.session, [row]) if isinstance(event, Token)]
    if len(times) < tokens:
        raise SystemExit(f"the text ended after {len(times)} of {tokens} tokens: {row.finish_reason}")
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", help="a model folder or run; without one nothing is measured")
    parser.add_argument("--tokens", type=int, default=200, help="that are decoded each time")
    parser.add_argument("--rounds", type=int, default=7, help="of each pair")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.model is None:
        print("skipped: name a model with -m")
        return
    generator = open_generator(options.model, threads=options.threads)
    ids = generator.tokenizer.encode("Some people and what is known of them:\n")
    ends = generator.end_ids
    generator.constrainer.grammar(Constraint("regex", "a", "regex"), ends)  # the vocabulary is prepared once
    results = []
    print(f"{'constraint':<12} {'sampling':<9} {'compiled ms':>12} {'free':>9} {'constrained':>12} {'ratio':>7}")
    for name, constraint in CONSTRAINTS.items():
        begun = time.perf_counter()
        grammar = generator.constrainer.grammar(constraint, ends)
        compiled = 1000 * (time.perf_counter() - begun)
        for label, sampling in SAMPLINGS.items():
            pairs = []
            for turn in range(options.rounds + 1):  # the first pair warms up
                pair = [speed(generator, ids, options.tokens, sampling, chosen) for chosen in (None, grammar)]
                pairs += [pair] if turn else []
            free, bound = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
            ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
            print(f"{name:<12} {label:<9} {compiled:>12.1f} {free:>9.1f} {bound:>12.1f} {ratio:>7.3f}")
            results.append({"constraint": name, "sampling": label, "free": free, "constrained": bound, "ratio": ratio})
    worst = min(float(result["ratio"]) for result in results)
    print(json.dumps({"benchmark": "constrained", "runs": results, "ratio": worst, "bar": BAR, "ok": worst >= BAR}))
    sys.exit(0 if worst >= BAR else 1)


if __name__ == "__main__":
    main()
