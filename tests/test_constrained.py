"""Constrained output: always what was asked for or told as cut; in batches, in files, from schemas to grammars."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from small_model import make_model, make_seven
from small_tokenizer import make_tokenizer
from test_generate import make_player, words_tokenizer

from llmcli.config import ConstraintConfig, GenerateConfig, SamplingConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, LlmcliError
from llmcli.operations.constraints import Constrainer, Constraint, read_constraint
from llmcli.operations.generate import Generated, Piece, generate
from llmcli.operations.generate_file import FileReport, generate_file
from llmcli.runtime.constraint import Grammar, Vocabulary
from llmcli.runtime.sampling import Sampler

GREEDY, HOT = SamplingConfig(temperature=0), SamplingConfig(temperature=1.5, top_p=1.0)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "春"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights over a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    return make_model(folder / "model", make_tokenizer(folder / "tokenizer"), context=256)


def made(
    model: Path,
    prompts: Sequence[str],
    sampling: SamplingConfig = HOT,
    constraint: dict[str, Any] | None = None,
    **values: Any,
) -> list[Generated]:
    config = GenerateConfig(**{"threads": 1, "seed": 0, "max_new_tokens": 150, **values})
    records = generate(model, prompts, config, sampling, ConstraintConfig(**(constraint or {})))
    return [record for record in records if isinstance(record, Generated)]


# ----------------------------------------------------------------------------------------------------------------
# What comes out


def test_json_fits_its_schema_whatever_the_model_would_say(small: Path) -> None:
    found = made(small, ["a", "Who?"], constraint={"json_schema": json.dumps(SCHEMA)}, num_samples=6)
    whole = [one for one in found if one.valid]
    assert len(whole) >= 6
    for one in whole:
        assert one.finish_reason == "stop"
        value = json.loads(one.text)
        assert set(value) == {"name", "age", "tags"}
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150
        assert set(value["tags"]) <= {"a", "é", "春"}
        assert len(value["tags"]) <= 3
    assert len({one.text for one in whole}) == len(whole)
    for one in found:  # the others were cut, and say so
        assert one.valid is (one.finish_reason == "stop")


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-[a-f]{2}",
        r"^(yes|no)$",
        r"[春-智]{2}é?",
        r"a+b",
        r"(\+|\*)\[x\]\\",
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, HOT, SamplingConfig(temperature=0.7, top_k=3, min_p=0.1)])
def test_text_matches_its_expression(small: Path, pattern: str, sampling: SamplingConfig) -> None:
    for one in made(small, ["x", "yz"], sampling, {"regex": pattern}, num_samples=2):
        if one.valid:
            assert re.fullmatch(pattern, one.text), one.text
        else:
            assert one.finish_reason == "length"
            assert pattern == r"a+b"


def test_a_choice_is_one_of_those_given_by_its_probability(small: Path) -> None:
    choices = ("yes", "no", "a.c", "春 [x]\n", "yesterday")
    found = made(small, ["x"], HOT, {"choice": choices}, num_samples=40, batch_size=40)
    assert {one.text for one in found} <= set(choices)
    assert len({one.text for one in found}) >= 3
    assert all(one.valid and one.finish_reason == "stop" for one in found)
    (one,) = made(small, ["x"], GREEDY, {"choice": ("no",)})
    assert one.text == "no"
    assert one.tokens == len(load_tokenizer(small).encode("no"))  # no step is spent on the end


def test_a_grammar_of_lark(small: Path, tmp_path: Path) -> None:
    (tmp_path / "sum.lark").write_text('start: NUMBER (("+" | "-") NUMBER)~1..3\nNUMBER: /[1-9][0-9]?/\n')
    for one in made(small, ["x"], HOT, {"grammar": str(tmp_path / "sum.lark")}, num_samples=8):
        assert one.valid
        assert re.fullmatch(r"[1-9]\d?([+-][1-9]\d?){1,3}", one.text)


def test_the_draw_is_that_of_the_model_among_what_is_allowed(small: Path) -> None:
    """Softmax over the allowed tokens alone, before temperature, top-k and the rest."""
    tokenizer = load_tokenizer(small)
    grammar = Constrainer(tokenizer).grammar(Constraint("regex", "[abc]", ""), [0])
    ids = [tokenizer.encode(letter)[0] for letter in "abc"]
    logits = np.random.default_rng(0).normal(size=tokenizer.vocab_size).astype(np.float32)
    logits[ids] = [0.0, 1.0, 2.0]
    drawn = [
        Sampler(SamplingConfig(temperature=1, top_p=1), seed=seed, matcher=grammar.matcher()).choose(logits, top=1)
        for seed in range(1000)
    ]
    shares = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    for identity, share in zip(ids, shares, strict=True):
        assert abs(sum(choice.id == identity for choice in drawn) / 1000 - share) < 0.05
    top = [
        Sampler(SamplingConfig(top_k=2, top_p=1), seed=seed, matcher=grammar.matcher()).choose(logits).id
        for seed in range(50)
    ]
    assert set(top) == set(ids[1:])
    # What is reported is the model's own.
    best = int(logits.argmax())
    assert drawn[0].top[0][0] == best
    assert drawn[0].logprob == pytest.approx(logits[drawn[0].id] - np.log(np.exp(logits.astype(float)).sum()), abs=1e-5)


def test_rows_of_a_batch_are_as_they_are_alone(small: Path) -> None:
    asked = {"json_schema": json.dumps(SCHEMA)}
    values: dict[str, Any] = {"constraint": asked, "num_samples": 2, "max_new_tokens": 40}
    alone = made(small, ["a", "Who?", "x" * 9], batch_size=1, **values)
    assert made(small, ["a", "Who?", "x" * 9], batch_size=6, **values) == alone


def test_the_limit_cuts_and_what_fits_by_then_does_not_count_as_cut(small: Path) -> None:
    (one,) = made(small, ["a"], GREEDY, {"regex": "[a-z]{30}"}, max_new_tokens=3)
    assert (one.valid, one.finish_reason, one.tokens) == (False, "length", 3)
    (one,) = made(small, ["a"], GREEDY, {"regex": "[ab]{1,90}"}, max_new_tokens=4)
    assert one.valid
    (one,) = made(small, ["a"], GREEDY, {"regex": "[a-z]{900}"}, max_new_tokens=400)
    assert (one.valid, one.finish_reason) == (False, "cut")  # the context


def test_the_end_of_the_text_may_come_only_where_the_text_fits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    model = make_player(tmp_path / "player", tokenizer, [0] * 60)  # it would end at once, always
    (one,) = made(model, ["a"], GREEDY, {"regex": "[0-9]{2,5}"})
    assert (one.valid, one.finish_reason, len(one.text)) == (True, "stop", 2)


def test_a_tokenizer_without_an_end_ends_where_nothing_can_follow(tmp_path: Path) -> None:
    words = words_tokenizer(tmp_path / "words", {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3})
    model = make_model(tmp_path / "model", words)
    for one in made(model, ["the"], HOT, {"regex": " (cat|the)s?"}, num_samples=8):
        assert re.fullmatch(" (cat|the)s?", one.text)
        assert one.valid


def test_tokens_of_equal_bytes_and_of_none(tmp_path: Path) -> None:
    tokens = [b"<end>", b"a", b"b", b"ab", b"", b"a", b"\xe6\x98", b"\xa5"]
    vocabulary = Vocabulary(tokens, {0}, {0})
    grammar = Grammar(vocabulary, "regex", "[ab]*|春", where="")
    matcher = grammar.matcher()
    allowed = np.flatnonzero(matcher.allowed()).tolist()
    assert {0, 1, 2, 3, 6} <= set(allowed) <= {0, 1, 2, 3, 5, 6}
    matcher.accept(6)
    assert np.flatnonzero(matcher.allowed()).tolist() == [7]
    assert not matcher.complete
    matcher.accept(7)
    assert (matcher.complete, matcher.ended) == (True, True)
    with pytest.raises(LlmcliError, match="cannot be followed"):
        grammar.matcher().accept(7)
    lonely = Grammar(Vocabulary([b"<end>", b"a"], {0}, {0}), "regex", "xy", where="")
    with pytest.raises(LlmcliError, match="cannot be followed"):
        lonely.matcher().allowed()


# ----------------------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"regex": "(a|b"}, "--regex: .*unclosed group"),
        ({"choice": ("a", "")}, "--choice: a choice must not be empty"),
        ({"regex": "a", "choice": ("b",)}, "give one of --regex and --choice"),
        ({"regex": ""}, "--regex: the expression must not be empty"),
        ({"json_schema": "false"}, "--json-schema: ."),
        ({"json_schema": "{"}, "--json-schema:1:2: is not valid JSON"),
        ({"json_schema": '{"type": "thing"}'}, "--json-schema: .*thing"),
        ({"json_schema": '{"not": {}}'}, "--json-schema: .*not"),
        ({"json_schema": '{"$ref": "http://example.org/x"}'}, "--json-schema: .*retriev"),
    ],
)
def test_a_wrong_constraint_is_one_line(small: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        made(small, ["a"], constraint=asked)
    assert "\n" not in str(caught.value)


def test_files_of_constraints(small: Path, tmp_path: Path) -> None:
    for name, text, told in (
        ("no.lark", "start: B\nB: (", r"no\.lark: .*2\("),
        ("list.json", "[1]", r"list\.json: is not a JSON schema"),
        ("torn.json", '{"type":\n', r"torn\.json:2:1: is not valid JSON"),
    ):
        (tmp_path / name).write_text(text)
        kind = "grammar" if name.endswith("lark") else "json_schema"
        with pytest.raises(ConfigError, match=told):
            made(small, ["a"], constraint={kind: str(tmp_path / name)})
    with pytest.raises(DataError, match="no such file"):
        read_constraint(ConstraintConfig(grammar=str(tmp_path / "nowhere")))
    (tmp_path / "s.json").write_text('{"const": 7}')
    assert made(small, ["a"], constraint={"json_schema": str(tmp_path / "s.json")})[0].text == "7"
    assert made(small, ["a"], constraint={"json_schema": '{"const": [1, "é"]}'})[0].valid


def test_without_the_package_the_extra_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(LlmcliError, match=r"llguidance: pip install 'llmcli\[grammar\]'"):
        made(small, ["a"], constraint={"regex": "a"})


def test_what_a_constraint_does_not_go_with(small: Path, tmp_path: Path) -> None:
    for values in ({"stop": ("a",)}, {"ignore_eos": True}):
        with pytest.raises(ConfigError, match="where a text ends"):
            made(small, ["a"], constraint={"regex": "a"}, **values)
    content = json.loads((make_seven(tmp_path / "t") / "tokenizer.json").read_text())
    content["decoder"] = {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="as bytes"):
        Constrainer(load_tokenizer(tmp_path / "t")).grammar(Constraint("regex", "a", ""), [0])


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_and_its_exit_code(small: Path, llmcli: Run) -> None:
    words = ("generate", "-m", small, "--seed", 1, "--threads", 1, "a")
    found = llmcli(*words, "--choice", "yes", "--choice", "no")
    assert found.returncode == 0
    assert found.stdout in ("yes\n", "no\n")
    found = llmcli(*words, "--json", "--regex", "[a-z]{90}", "--max-new-tokens", 2)
    assert found.returncode == 4
    record = json.loads(found.stdout)
    assert (record["finish_reason"], record["valid"], record["tokens"]) == ("length", False, 2)
    assert json.loads(found.stderr)["error"]["kind"] == "cut"
    found = llmcli(*words, "--regex", "(")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1


def test_a_file_of_prompts_under_a_constraint_counts_what_was_cut(small: Path, tmp_path: Path, llmcli: Run) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": letter, "id": letter}) + "\n" for letter in "abc"))
    words = ("generate", "-m", small, "--seed", 1, "--threads", 1, "-i", source, "-o", output, "--max-new-tokens", 30)
    words = (*words, "--json-schema", json.dumps(SCHEMA))
    found = llmcli(*words)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == ["a", "b", "c"]
    cut = sum(not record["valid"] for record in records)
    assert cut > 0
    assert found.returncode == 4
    assert f"{cut} texts were cut short" in found.stderr
    assert llmcli(*words).returncode == 4  # all stand there already
    config = GenerateConfig(max_new_tokens=30, seed=1, threads=1)
    with pytest.raises(LlmcliError, match="of another model, setting or input"):
        list(generate_file(small, str(source), output, config, constraint=ConstraintConfig(regex="a")))
    plain = list(generate_file(small, str(source), tmp_path / "plain.jsonl", config))
    assert isinstance(plain[-1], FileReport)
    assert plain[-1].cut == 0
    assert "valid" not in (tmp_path / "plain.jsonl").read_text()


def test_pieces_of_a_constrained_text_are_streamed(small: Path) -> None:
    config = GenerateConfig(threads=1, seed=0, max_new_tokens=60)
    records = list(generate(small, "a", config, HOT, ConstraintConfig(choice=("one two three four",))))
    pieces = [record.text for record in records if isinstance(record, Piece)]
    assert len(pieces) > 3
    assert list(itertools.accumulate(pieces))[-1] == "one two three four"
