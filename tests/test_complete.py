"""Autocompletion: probabilities against counting all paths, healing, and the command."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from small_model import make_model, make_seven
from small_tokenizer import make_tokenizer

from llmcli.cli.complete import complete as command
from llmcli.config import CompleteConfig
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.models.decoder import Decoder
from llmcli.models.folder import load_model
from llmcli.operations.complete import Completer, TextRules, complete
from llmcli.runtime.search import search
from llmcli.runtime.torch_session import TorchSession, open_session

WORD = re.compile(r"\s*(?:[\w']+|[^\w\s]+)")
LINE = re.compile(r"[\r\n]*[^\r\n]+")


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over seven tokens."""
    place = tmp_path_factory.mktemp("seven")
    return make_model(place / "model", make_seven(place / "tokenizer"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over 800 tokens, of which it prefers some."""
    place = tmp_path_factory.mktemp("small")
    return make_model(place / "model", make_tokenizer(place / "tokenizer"), context=48)


def counted(
    model: Decoder, tokenizer: TextTokenizer, prompt: list[int], required: bytes, longest: int, pattern: re.Pattern[str]
) -> dict[str, float]:
    """Every path, one by one: text after what is required -> probability given that it is met."""
    results: dict[str, float] = defaultdict(float)
    met = 0.0

    def follow(path: list[int], probability: float) -> None:
        nonlocal met
        before = b"".join(tokenizer.token_bytes(identity) for identity in path)
        with torch.inference_mode():
            shares = torch.softmax(model(torch.tensor([prompt + path]))[0, -1].double(), -1)
        for identity, share in enumerate(shares.tolist()):
            spelled = before + tokenizer.token_bytes(identity)
            if len(before) < len(required):
                if identity == 0 or not (spelled.startswith(required) or required.startswith(spelled)):
                    continue
                met += probability * share if len(spelled) >= len(required) else 0.0
            text = (before if identity == 0 else spelled)[len(required) :].decode()
            found = pattern.match(text)
            if identity == 0:
                if found and found.end() == len(text):
                    results[text] += probability * share
            elif found and found.end() < len(text):
                results[found.group()] += probability * share
            elif len(path) + 1 < longest:
                follow([*path, identity], probability * share)
            elif found:
                results[text] += probability * share

    follow([], 1.0)
    return {text: probability / (met if required else 1.0) for text, probability in results.items()}


def test_a_prefix_stands_where_texts_begin(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(small, device="cpu", threads=1)
    fed: list[int] = []
    real = session.start
    monkeypatch.setattr(session, "start", lambda prompts: (fed.append(prompts[0][0]), real(prompts))[1])
    ended = load_tokenizer(small)
    begun = make_tokenizer(tmp_path / "begun")
    (begun / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "a"}))
    tokenizer = load_tokenizer(begun)
    for each, expected in ((ended, ended.eos_id), (tokenizer, tokenizer.bos_id)):
        Completer(session, each).complete("The ", CompleteConfig(count=1, max_new_tokens=2))
        assert fed.pop() == each.begin_id == expected
    assert ended.eos_id != tokenizer.bos_id


# ----------------------------------------------------------------------------------------------------------------
# Probabilities


@pytest.mark.parametrize(
    ("prompt", "required", "until", "pattern"),
    [
        ([0], b"", "word", WORD),
        ([0, 1, 3], b"", "line", LINE),
        ([0, 4], b" a", "word", WORD),  # " " + "a", " a", " " + "ab": three ways to meet it
        ([0], b"ab", "word", WORD),
        ([0, 2], b"a", "line", LINE),
    ],
)
def test_search_equals_counting_all_paths(
    seven: Path, prompt: list[int], required: bytes, until: str, pattern: re.Pattern[str]
) -> None:
    session, tokenizer = open_session(seven, device="cpu", threads=1), load_tokenizer(seven)
    expected = counted(session.model, tokenizer, prompt, required, 4, pattern)
    rules = TextRules(Completer(session, tokenizer)._endings(until), required)
    found = search(session, prompt, rules, count=20, max_tokens=4, width=7**4, floor=0.0)
    best = sorted(expected.values(), reverse=True)[:20]
    assert [item.probability for item in found] == pytest.approx(best, rel=1e-4)
    for item in found:
        assert item.probability == pytest.approx(expected[str(item.key)], rel=1e-4)
    assert sum(expected.values()) <= 1 + 1e-9


def test_the_beam_finds_the_best_with_nearly_their_probability(seven: Path) -> None:
    session, tokenizer = open_session(seven, device="cpu", threads=1), load_tokenizer(seven)
    whole = search(
        session,
        [0],
        TextRules(Completer(session, tokenizer)._endings("word"), b"ab"),
        count=3,
        max_tokens=6,
        width=7**4,
        floor=0.0,
    )
    beam = Completer(session, tokenizer).complete("ab", CompleteConfig(count=3, max_new_tokens=5))
    assert [item.text for item in beam.completions] == [item.key for item in whole]
    for item, exact in zip(beam.completions, whole, strict=True):
        assert exact.probability * 0.9 <= item.probability <= exact.probability * (1 + 1e-5)


def test_tokenizations_of_one_text_are_one_completion(seven: Path) -> None:
    found = complete(seven, "", CompleteConfig(count=50, max_new_tokens=4))
    texts = [item.text for item in found.completions]
    assert len(texts) == len(set(texts))
    assert "ab" in texts  # "a" + "b" and "ab"


# ----------------------------------------------------------------------------------------------------------------
# Healing


def test_a_word_that_was_begun_goes_on(small: Path) -> None:
    session, tokenizer = open_session(small, device="cpu", threads=1), load_tokenizer(small)
    completer = Completer(session, tokenizer)
    found = completer.complete("The functi", CompleteConfig(count=30))
    assert found.healed == " functi"
    assert found.prompt_tokens == 1 + len(tokenizer.encode("The"))
    assert 0 < sum(item.probability for item in found.completions) <= 1
    # The same text reached from tokens that the prefix's own cut rules out.
    ids = tokenizer.encode("The functions")
    assert ids[: len(tokenizer.encode("The functi"))] != tokenizer.encode("The functi")


def test_what_nothing_else_can_spell_is_kept(seven: Path) -> None:
    completer = Completer(open_session(seven, device="cpu", threads=1), load_tokenizer(seven))
    assert completer._healed("ab\n")[1] == []  # only one token spells a line end
    assert completer._healed("ab")[1] == [4]
    assert completer._healed("")[1] == []


def test_completions_are_of_one_word_or_line(small: Path) -> None:
    session = open_session(small, device="cpu", threads=1)
    completer = Completer(session, load_tokenizer(small))
    for prefix in ("", "The value", "if x:", "春眠", "don"):
        for item in completer.complete(prefix, CompleteConfig(count=10)).completions:
            assert WORD.fullmatch(item.text.replace("\ufffd", "x")) or not item.text.isascii()
            assert item.text.strip()
        for item in completer.complete(prefix, CompleteConfig(count=5, until="line", max_new_tokens=6)).completions:
            assert "\n" not in item.text.lstrip("\n")


# ----------------------------------------------------------------------------------------------------------------
# The context, and errors


def test_a_prefix_longer_than_the_context(small: Path) -> None:
    session, tokenizer = open_session(small, device="cpu", threads=1), load_tokenizer(small)
    completer, prefix = Completer(session, tokenizer), "one two three four " * 20
    length = 1 + len(tokenizer.encode(prefix))
    with pytest.raises(UsageError, match=rf"has {length} tokens, the model's context is 48"):
        completer.complete(prefix)
    found = completer.complete(prefix, CompleteConfig(truncate=True))
    assert found.completions
    assert found.truncated_tokens > 0


def test_every_length_up_to_the_context_works(seven: Path) -> None:
    completer = Completer(open_session(seven, device="cpu", threads=1), load_tokenizer(seven))
    for length in range(28, 32):
        assert completer.complete("\n" * length).completions
    with pytest.raises(UsageError, match="33 tokens"):
        completer.complete("\n" * 32)


def test_a_model_without_tokenizer_or_with_a_larger_one(seven: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((seven / name).read_bytes())
    with pytest.raises(DataError, match="tokenizer"):
        complete(tmp_path / "bare", "a")
    with pytest.raises(DataError, match="800 tokens, the model 7"):
        Completer(TorchSession(load_model(seven)), load_tokenizer(small))


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_lines_and_json(seven: Path) -> None:
    lines = CliRunner().invoke(command, ["-m", str(seven), "ab", "-n", "3"], catch_exceptions=False).stdout
    rows = [line.split("\t") for line in lines.splitlines()]
    assert len(rows) == 3
    assert all(re.fullmatch(r"[01]\.\d{4}", row[0]) and len(row) == 2 for row in rows)
    found = json.loads(CliRunner().invoke(command, ["-m", str(seven), "ab", "-n", "3", "--json"]).stdout)
    assert {"prefix", "completions", "healed", "truncated_tokens"} <= set(found)
    assert {"text", "prompt_tokens", "tokens", "finish_reason", "seed"} <= set(found)  # as generate has them
    assert found["prefix"] == "ab"
    assert list(found["completions"][0]) == ["text", "probability", "finish_reason", "tokens"]
    assert found["text"] == found["completions"][0]["text"]
    shown = [item["text"].replace("\n", "\\n") for item in found["completions"]]
    assert shown == [row[1] for row in rows]


def test_the_command_joins_what_is_piped(seven: Path) -> None:
    piped = CliRunner().invoke(command, ["-m", str(seven), "--json", "b"], input="a\n").stdout
    assert json.loads(piped)["prefix"] == "a\nb"
    assert json.loads(CliRunner().invoke(command, ["-m", str(seven), "--json"], input="").stdout)["prefix"] == ""
