"""`evaluate --task summarize`: summaries by ROUGE-1, ROUGE-2 and ROUGE-L (F1, with stemming).

Invariant: the numbers are those of the package rouge-score; of several summaries of a text the one that fits best
counts, metric by metric (as SciTLDR is scored, arXiv:2004.15011).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmcli.data.examples import Example, SummaryExample
from llmcli.data.task_prompts import SUMMARY_STOP, summary_parts
from llmcli.errors import MissingExtraError
from llmcli.operations.evaluate_figures import Means, Measure, Outcome
from llmcli.operations.evaluate_model import EvaluatedModel

_TOKENS = 128


class SummarizeTask:
    """Summaries, written greedily."""

    names: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")

    def __init__(self) -> None:
        self._scorer = _open_scorer(self.names)

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Means over texts."""
        return Means(self.names)

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        texts = [example for example in examples if isinstance(example, SummaryExample)]
        tokens = model.config.max_new_tokens or _TOKENS
        prompts = (summary_parts(each.source) for each in texts)
        written = model.written(prompts, SUMMARY_STOP, tokens, [each.where for each in texts])
        for example, (text, cut) in zip(texts, written, strict=True):
            values = self.scores(example.targets, text.strip())
            yield Outcome(values, {"targets": list(example.targets), "predicted": text.strip(), **values}, cut)

    def scores(self, targets: Sequence[str], summary: str) -> dict[str, float]:
        """F1 by metric."""
        found = self._scorer.score_multi(list(targets), summary)
        return {name: float(found[name].fmeasure) for name in self.names}


def _open_scorer(names: Sequence[str]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("rouge-score", "eval", "scoring summaries") from error
    return RougeScorer(list(names), use_stemmer=True)
