"""The figures of evaluations: SQuAD's rules, ROUGE, confusion, intervals, tests of differences, thresholds."""

from __future__ import annotations

import itertools
import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, pearsonr, spearmanr

from llmcli.data.task_prompts import NO_ANSWER, answer_prompt, said_answer, summary_prompt
from llmcli.errors import ConfigError
from llmcli.operations.evaluate_answer import answer_scores, normalized
from llmcli.operations.evaluate_choice import share_of
from llmcli.operations.evaluate_classify import ClassifyTask, Confusion, confusion_matrix
from llmcli.operations.evaluate_embed import Correlations
from llmcli.operations.evaluate_figures import (
    Means,
    Outcome,
    check_names,
    compare_text,
    differences_of,
    features_of,
    figures_of,
    intervals_of,
    missed,
    read_thresholds,
)
from llmcli.operations.evaluate_summarize import SummarizeTask

# ----------------------------------------------------------------------------------------------------------------
# Answers, as evaluate-v2.0.py of SQuAD scores them: (right answers, answer, exact match, F1)

ANSWERS = [
    (["The Normans"], "normans", 1.0, 1.0),  # articles and case
    (["10th and 11th centuries"], "the 10th and the 11th centuries!", 1.0, 1.0),  # punctuation
    (["well-known"], "wellknown", 1.0, 1.0),  # punctuation goes, nothing comes in its place
    (["well-known"], "well known", 0.0, 0.0),
    (["a  b\tc"], "B C", 1.0, 1.0),  # white space, and an article that is all of a word
    (["Denmark, Iceland and Norway"], "Denmark and Norway", 0.0, 2 * 1.0 * 0.75 / 1.75),
    (["Rollo", "Rollo of Normandy"], "duke Rollo of Normandy", 0.0, 2 * 0.75 * 1.0 / 1.75),  # the best of several
    (["yes yes"], "yes", 0.0, 2 * 1.0 * 0.5 / 1.5),  # words are counted as often as they stand
    (["Paris"], "London", 0.0, 0.0),
    ([], "", 1.0, 1.0),  # there is no answer, and none is given
    ([], "Paris", 0.0, 0.0),
    (["Paris"], "", 0.0, 0.0),
    ([], "the", 1.0, 1.0),  # nothing is left of it
    (["the", "Paris"], "", 0.0, 0.0),  # right answers of which nothing is left do not count
    (["“Paris”"], "Paris", 0.0, 0.0),  # only ASCII's punctuation goes
]


@pytest.mark.parametrize(("right", "answer", "exact", "f1"), ANSWERS)
def test_answers_are_scored_by_the_rules_of_squad(right: list[str], answer: str, exact: float, f1: float) -> None:
    assert answer_scores(right, answer) == pytest.approx((exact, f1), abs=1e-9)


def script_tokens(text: str) -> list[str]:
    """The script's rules written down anew: lower case, no punctuation, no articles, words between white space."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    parts = ["".join(group) for _, group in itertools.groupby(bare, lambda letter: letter.isalnum())]
    return "".join(" " if part in ("a", "an", "the") else part for part in parts).split()


def script_scores(right: list[str], answer: str) -> tuple[float, float]:
    """Exact match and F1 of evaluate-v2.0.py: an answer of which nothing is left is none; the best of the rest."""
    said = script_tokens(answer)
    exact = f1 = 0.0
    for wanted in [tokens for tokens in map(script_tokens, right) if tokens] or [[]]:
        exact = max(exact, float(wanted == said))
        rest = list(wanted)
        shared = sum(token in rest and rest.remove(token) is None for token in said)  # type: ignore[func-returns-value]
        if not wanted or not said:
            f1 = max(f1, float(wanted == said))
        elif shared:
            f1 = max(f1, 2 * shared / (len(wanted) + len(said)))
    return exact, f1


WORDS = st.lists(
    st.sampled_from(["the", "The", "a", "An", "cat", "Cat.", "cats", "10", "1,000", "-", "the-cat", "“an”", "\t", "é"]),
    max_size=6,
).map(" ".join)


@given(st.lists(WORDS | st.text(max_size=12), max_size=3), WORDS | st.text(max_size=12))
def test_any_answer_is_scored_as_the_rules_written_anew_score_it(right: list[str], answer: str) -> None:
    assert answer_scores(right, answer) == pytest.approx(script_scores(right, answer), abs=1e-9)


def test_an_answer_is_normalized_in_the_scripts_order() -> None:
    # Punctuation goes before articles: what joins to an article is one, what it held apart is none.
    assert normalized("T.h.e cat") == "cat"
    assert normalized("a-b An apple, THE end.") == "ab apple end"


def test_no_answer_is_an_outcome_and_prompts_ask_for_one_line() -> None:
    assert [said_answer(text) for text in (" no answer\n", "No answer.", "", "  ")] == [""] * 4
    assert said_answer(" no answer given ") == "no answer given"
    assert said_answer(NO_ANSWER) == ""
    assert answer_prompt("Rome fell.", "What fell?") == "Rome fell.\n\nquestion: What fell?\nanswer:"
    assert summary_prompt("Rome fell.") == "Rome fell.\n\nsummary:"


# ----------------------------------------------------------------------------------------------------------------
# Summaries


def test_rouge_is_that_of_hand_worked_examples_and_the_best_target_counts() -> None:
    task = SummarizeTask()
    # "the cat was found under the bed" / "the cat was under the bed": 6 words shared of 7 and 6, 4 pairs of 6 and 5.
    found = task.scores(["the cat was found under the bed"], "the cat was under the bed")
    assert found == pytest.approx({"rouge1": 12 / 13, "rouge2": 8 / 11, "rougeL": 12 / 13}, abs=1e-4)
    # L: "police kill the gunman" keeps three of four words in order; with the stem of "killed" four words are shared.
    found = task.scores(["police killed the gunman"], "the gunman kill police")
    assert found == pytest.approx({"rouge1": 1.0, "rouge2": 1 / 3, "rougeL": 0.5}, abs=1e-4)
    several = task.scores(["nothing alike", "the gunman kills police"], "the gunman kill police")
    assert several == pytest.approx({"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})
    assert task.scores(["some words"], "") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


# ----------------------------------------------------------------------------------------------------------------
# Labels


def labelled(pairs: list[tuple[str, str]]) -> list[Outcome]:
    return [
        Outcome({"accuracy": float(right == said)}, {"labels": [right], "predicted": [said], "probability": 1.0})
        for right, said in pairs
    ]


def test_labels_are_scored_as_worked_out_by_hand() -> None:
    # right: cat 3, dog 2, fox 1; predicted: cat 2 (2 right), dog 3 (1 right), cow 1 (never there)
    run = labelled([("cat", "cat"), ("cat", "cat"), ("cat", "dog"), ("dog", "dog"), ("dog", "cow"), ("fox", "dog")])
    measure = ClassifyTask().measure([run])
    assert isinstance(measure, Confusion)
    features = features_of(measure, run)
    f1 = {"cat": 2 * 1.0 * (2 / 3) / (5 / 3), "dog": 2 * (1 / 3) * 0.5 / (5 / 6), "fox": 0.0, "cow": 0.0}
    assert figures_of(measure, features) == pytest.approx({"accuracy": 3 / 6, "macro_f1": sum(f1.values()) / 4})
    details = measure.details(features.sum(0))["per_class"]
    assert details["dog"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": f1["dog"], "examples": 2})
    assert details["cow"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 0}
    assert measure.labels == ["cat", "cow", "dog", "fox"]
    assert confusion_matrix(run, measure.labels) == [[2, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]


def test_several_labels_are_right_only_together_and_have_no_matrix() -> None:
    run = [
        Outcome({"accuracy": 1.0}, {"labels": ["a", "b"], "predicted": ["b", "a"]}),
        Outcome({"accuracy": 0.0}, {"labels": ["a"], "predicted": []}),
    ]
    measure = ClassifyTask().measure([run])
    found = figures_of(measure, features_of(measure, run))
    assert found == pytest.approx({"accuracy": 0.5, "macro_f1": (2 / 3 + 1) / 2})
    assert confusion_matrix(run, ["a", "b"]) is None


def test_equal_scores_count_as_guessing() -> None:
    assert share_of([-1.0, -1.0], 0) == 0.5
    assert share_of([-1.0, -2.0, -1.0], 1) == 0.0
    assert share_of([-3.0, -2.0], 1) == 1.0


# ----------------------------------------------------------------------------------------------------------------
# Intervals and differences


def shares(values: list[float]) -> list[Outcome]:
    return [Outcome({"accuracy": value}, {}) for value in values]


def test_a_mean_is_over_the_examples_that_have_the_value() -> None:
    run = [Outcome({"f1": 1.0, "has": 0.5}, {}), Outcome({"f1": 0.0}, {}), Outcome({"f1": 0.5}, {})]
    measure = Means(("f1", "has", "none"))
    assert figures_of(measure, features_of(measure, run)) == {"f1": 0.5, "has": 0.5}


def correlated(count: int, noise: float, seed: int) -> list[Outcome]:
    drawn = np.random.default_rng(seed)
    scores = np.random.default_rng(9).integers(0, 26, count) / 5  # many are equal, as in STS-B
    cosines = np.round(0.8 + 0.2 * (scores / 5 + noise * drawn.normal(size=count)), 2)
    return [Outcome({"score": s, "cosine": c}, {}) for s, c in zip(scores.tolist(), cosines.tolist(), strict=True)]


def test_correlations_and_their_intervals_are_scipys() -> None:
    run, measure = correlated(200, 0.3, 1), Correlations()
    features = features_of(measure, run)
    found, intervals = figures_of(measure, features), intervals_of(measure, features, ["spearman", "pearson"], 0)
    for name, theirs in (("spearman", spearmanr), ("pearson", pearsonr)):
        expected = theirs(features[:, 0], features[:, 1]).statistic
        assert found[name] == pytest.approx(expected, abs=1e-12)
        drawn = bootstrap(
            (features[:, 0], features[:, 1]),
            lambda x, y, theirs=theirs: theirs(x, y).statistic,
            paired=True,
            vectorized=False,
            n_resamples=500,
            method="percentile",
            rng=3,
        )
        assert intervals[name] == pytest.approx(tuple(drawn.confidence_interval), abs=0.02)


def test_two_models_correlations_are_compared_whatever_their_cosines_lie_between() -> None:
    measure = Correlations()
    better, worse = (features_of(measure, correlated(150, noise, 4 + place)) for place, noise in enumerate((0.2, 0.5)))
    wide = better * np.array([1.0, 20.0, 20.0]) - np.array([0.0, 18.0, 18.0])  # the same model in another unit
    for second in (better, wide):
        found = differences_of(measure, worse, second, ["spearman", "pearson"], 0)
        assert all(each.difference > 0.1 and each.p_value < 0.01 for each in found.values())
    same = differences_of(measure, better, wide, ["spearman", "pearson"], 0)
    assert all(abs(each.difference) < 1e-9 and each.p_value > 0.9 for each in same.values())
    flat = [Outcome({"score": 1.0, "cosine": c}, {}) for c in (0.1, 0.2)]
    assert figures_of(measure, features_of(measure, flat)) == {}


def test_an_interval_is_that_of_the_normal_law_where_that_holds() -> None:
    run = shares([1.0] * 300 + [0.0] * 700)
    measure = Means(("accuracy",))
    interval = intervals_of(measure, features_of(measure, run), ["accuracy"], seed=0)["accuracy"]
    assert interval is not None
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert interval == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    alone = features_of(measure, run[:1])
    assert intervals_of(measure, alone, ["accuracy"], seed=0) == {"accuracy": None}


def compared(first: list[float], second: list[float], seed: int = 0) -> tuple[float, float]:
    measure = Means(("accuracy",))
    tables = [features_of(measure, shares(values)) for values in (first, second)]
    found = differences_of(measure, tables[0], tables[1], ["accuracy"], seed)["accuracy"]
    assert found.interval is None or found.interval[0] <= found.difference <= found.interval[1]
    return found.difference, found.p_value


def test_few_differences_are_tested_exactly_as_by_the_sign_test() -> None:
    # 8 examples gained, 1 lost: the two-sided sign test has 2 (1 + 9) / 2^9.
    first = [0.0] * 8 + [1.0] + [1.0] * 20
    second = [1.0] * 8 + [0.0] + [1.0] * 20
    difference, p_value = compared(first, second)
    assert difference == pytest.approx(7 / 29)
    assert p_value == pytest.approx(20 / 512)
    assert compared(second, first)[1] == pytest.approx(20 / 512)


def test_many_differences_are_tested_by_drawing_which_comes_close_to_the_sign_test() -> None:
    from scipy.stats import binomtest

    first = [0.0] * 35 + [1.0] * 20 + [1.0] * 100
    second = [1.0] * 35 + [0.0] * 20 + [1.0] * 100
    assert compared(first, second)[1] == pytest.approx(binomtest(35, 55).pvalue, abs=0.01)
    assert compared(first, second) == compared(first, second)


def test_equal_models_do_not_differ_and_a_plain_difference_is_found() -> None:
    values = [0.0, 1.0] * 50
    assert compared(values, values) == (0.0, 1.0)
    assert compared([0.0] * 60, [1.0] * 60)[1] < 0.001


def test_the_test_holds_its_level_where_the_models_are_alike() -> None:
    generator = np.random.default_rng(1)
    measure = Means(("margin",))
    found = []
    for seed in range(60):
        tables = [
            features_of(measure, [Outcome({"margin": float(value)}, {}) for value in generator.normal(size=12)])
            for _ in range(2)
        ]
        found.append(differences_of(measure, tables[0], tables[1], ["margin"], seed)["margin"].p_value)
    assert 0.3 < np.mean(found) < 0.7
    assert sum(value < 0.05 for value in found) <= 9


def test_texts_of_two_tokenizers_are_laid_side_by_side() -> None:
    # The second one has half the tokens and other windows; block by block it needs a tenth less.
    generator = np.random.default_rng(0)
    nats = generator.uniform(5, 15, size=400)
    first = (nats.tolist(), [10] * 400)
    second = ((nats.reshape(200, 2).sum(1) * 0.9).tolist(), [10] * 200)
    found = compare_text(first, second, 4000, 0)["bits_per_byte"]
    assert found.difference == pytest.approx(-0.1 * nats.sum() / 4000 / math.log(2))
    assert found.p_value < 0.001
    assert found.interval is not None
    assert found.interval[1] < 0


# ----------------------------------------------------------------------------------------------------------------
# Thresholds


def test_thresholds_are_read_and_a_metric_below_its_bar_is_told() -> None:
    bars = read_thresholds("accuracy=0.8, f1=.5")
    assert bars == {"accuracy": 0.8, "f1": 0.5}
    assert [str(each) for each in missed(bars, {"accuracy": 0.79, "f1": 0.5}, "m")] == [
        "m: accuracy is 0.7900, below 0.8"
    ]
    assert "not defined" in str(missed(bars, {"accuracy": 0.9}, "m")[0])
    assert "above 2" in str(missed({"loss": 2.0}, {"loss": 2.5}, "m")[0])
    assert not missed({"loss": 2.0}, {"loss": 1.5}, "m")
    assert read_thresholds(None) == {}
    with pytest.raises(ConfigError, match="mean accuracy"):
        check_names({"acuracy": 1.0}, ("accuracy", "f1"))


@pytest.mark.parametrize("text", ["accuracy", "accuracy=high", "=1", "accuracy=nan"])
def test_thresholds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="METRIC=NUMBER"):
        read_thresholds(text)
