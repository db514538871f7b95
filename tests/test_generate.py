"""Generation: whole characters, seeds, stops, prompts that do not fit; the command; files of prompts, resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT, Run
from forked import Life, run, until
from small_model import make_model, make_seven
from small_tokenizer import make_tokenizer

from llmcli.cli.generate import generate as command
from llmcli.config import ExportConfig, GenerateConfig, SamplingConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, LlmcliError, UsageError
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.folder import load_model, save_model
from llmcli.operations.constraints import Constraint
from llmcli.operations.export import export
from llmcli.operations.generate import Failed, Generated, Generator, Piece, Prompt, generate, open_generator
from llmcli.operations.generate_file import FileReport, FileStarted, generate_file
from llmcli.runtime.torch_session import TorchSession

CONTEXT = 128
GREEDY, DRAWN = SamplingConfig(temperature=0), SamplingConfig()
CHINESE = "春眠不觉晓,处处闻啼鸟👩‍👧é"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 800 tokens."""
    return make_tokenizer(tmp_path_factory.mktemp("made") / "tokenizer")


@pytest.fixture(scope="module")
def small(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over 800 tokens, of which it prefers some."""
    return make_model(tmp_path_factory.mktemp("small") / "model", tokenizer, context=48)


Make = Callable[..., Path]


@pytest.fixture
def player(tokenizer: Path, tmp_path: Path) -> Make:
    """Makes a model that plays tokens: what follows position p is the p-th of them, whatever was asked."""
    return lambda pieces, **details: make_player(tmp_path / "player", tokenizer, pieces, **details)


def make_player(folder: Path, tokenizer: Path, pieces: Sequence[str | int], context: int = CONTEXT) -> Path:
    """`pieces`: texts, of which each is encoded by itself, and ids."""
    opened = load_tokenizer(tokenizer)
    ids = [item for piece in pieces for item in ([piece] if isinstance(piece, int) else opened.encode(piece))]
    assert len(ids) <= context
    config = DecoderConfig(
        model_type="gpt2",
        vocab_size=opened.vocab_size,
        hidden_size=context,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=context,
        intermediate_size=4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        model.transformer.wpe.weight.copy_(torch.eye(context))  # the hidden state is the position
        for position, identity in enumerate(ids):
            model.lm_head.weight[identity, position] = 10.0
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, special_ids={"bos_token_id": None, "eos_token_id": opened.eos_id, "pad_token_id": None})
    opened.save(folder)
    return folder


def words_tokenizer(folder: Path, vocabulary: dict[str, int]) -> Path:
    """A tokenizer of a few words in sentencepiece's way, the space before them; </s> ends a text where it is there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} if "</s>" in vocabulary else {}))
    return folder


def configured(**values: Any) -> GenerateConfig:
    return GenerateConfig(**{"threads": 1, "seed": 0, **values})


def ran(
    model: Path, prompts: str | Sequence[str | Prompt], sampling: SamplingConfig = GREEDY, **values: Any
) -> tuple[list[Generated], list[Piece]]:
    """What ended, in order, and the pieces before it."""
    records = list(generate(model, prompts, configured(**values), sampling))
    assert not [record for record in records if isinstance(record, Failed)]
    ended = [record for record in records if isinstance(record, Generated)]
    pieces = [record for record in records if isinstance(record, Piece)]
    for one in ended:
        own = [piece.text for piece in pieces if (piece.index, piece.sample) == (one.index, one.sample)]
        assert "".join(own) == one.text
    return ended, pieces


# ----------------------------------------------------------------------------------------------------------------
# Text


def test_pieces_are_whole_characters(player: Make) -> None:
    model = player([CHINESE])
    (one,), pieces = ran(model, "a", max_new_tokens=len(load_tokenizer(model).encode(CHINESE)))
    assert one.text == CHINESE
    assert one.tokens > len(CHINESE)  # its characters are cut into bytes
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert len(pieces) > 10


def test_a_character_that_the_limit_cuts_in_two_is_left_out(player: Make) -> None:
    model = player([CHINESE])
    (one,), pieces = ran(model, "a", max_new_tokens=4)
    assert one.text == "春"
    assert [piece.text for piece in pieces] == ["春"]
    assert (one.tokens, one.finish_reason) == (4, "length")


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "reason"),
    [
        (["ab", "c", "d", "ef"], ["cd"], "ab", "stop"),
        (["ab", "<", "/", "s", ">x"], ["</s>"], "ab", "stop"),
        (["ab", "<", "/", "s", "q", "z"], ["</s>"], "ab</sqz", "stop"),
        (["xx", "x", "y"], ["xxxy"], "", "stop"),
        (["aab", "aab", "c"], ["aabc"], "aab", "stop"),
        (["a", "b", "c"], ["c", "bc"], "a", "stop"),  # both end with the same token, the longer began first
        (["a", "<"], ["<b"], "a<", "stop"),  # what was held back comes when the text ends
        (["春", "眠", "不"], ["眠"], "春", "stop"),
        (["a\n", "\n", "b"], ["\n\n"], "a", "stop"),
    ],
)
def test_a_stop_string_over_token_borders(
    player: Make, pieces: list[str], stops: list[str], text: str, reason: str
) -> None:
    model = player([*pieces, 0])
    (one,), shown = ran(model, "a", stop=tuple(stops))
    assert (one.text, one.finish_reason) == (text, reason)
    assert "".join(piece.text for piece in shown) == text


def test_nothing_of_a_stop_string_is_shown_before_it_is_known(player: Make) -> None:
    seen = ""
    for record in generate(player(["a", "E", "N", "D"]), "b", configured(stop=("END",)), GREEDY):
        if isinstance(record, Piece):
            seen += record.text
            assert "E" not in seen
    assert seen == "a"


def test_a_text_ends_by_its_end_its_limit_or_the_context(player: Make) -> None:
    model = player(["a", "b", 0, "c"], context=16)
    expected = [("ab", 2, "stop"), ("abc", 4, "length"), ("abc", 16, "cut")]  # the end itself is no text
    settings = [{}, {"ignore_eos": True, "max_new_tokens": 4}, {"ignore_eos": True}]
    for (text, tokens, reason), values in zip(expected, settings, strict=True):
        (one,), _ = ran(model, "a", **values)
        assert (one.text[: len(text)], one.tokens, one.finish_reason) == (text, tokens, reason)
        assert one.prompt_tokens == 1


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_models_files_say_which_tokens_end_a_text(player: Make, name: str) -> None:
    model = player(["a", "b", "c", 0])
    number = load_tokenizer(model).encode("b")[0]
    (model / "generation_config.json").unlink()
    content = json.loads((model / name).read_text()) if name == "config.json" else {}
    (model / name).write_text(json.dumps({**content, "eos_token_id": [5, number]}))
    assert ran(model, "a")[0][0].text == "a"


def test_special_tokens_in_a_prompt_are_plain_text(small: Path) -> None:
    (one,), _ = ran(small, "<|endoftext|>", max_new_tokens=1)
    assert one.prompt_tokens == len(load_tokenizer(small).encode("<|endoftext|>")) > 3


def test_a_text_that_goes_on_keeps_the_space_that_begins_it(tmp_path: Path) -> None:
    """A decoder of sentencepiece's kind drops the space at the begin of a text."""
    tokenizer = words_tokenizer(tmp_path / "words", {"</s>": 0, "▁the": 1, "▁cat": 2, "s": 3})
    model = make_player(tmp_path / "model", tokenizer, [2, 3, 1, 0], context=16)
    assert ran(model, "the")[0][0].text == " cats the"


# ----------------------------------------------------------------------------------------------------------------
# Seeds, samples, batches


def test_a_seed_gives_its_text_again_and_others_differ(small: Path) -> None:
    drawn = SamplingConfig(temperature=1.0, top_p=1.0)
    texts = {seed: ran(small, "The", drawn, seed=seed, max_new_tokens=12)[0][0].text for seed in range(4)}
    assert len(set(texts.values())) == 4
    assert ran(small, "The", drawn, seed=2, max_new_tokens=12)[0][0].text == texts[2]
    new = [ran(small, "The", drawn, seed=None, max_new_tokens=12)[0][0] for _ in range(2)]
    assert new[0].seed != new[1].seed
    assert ran(small, "The", drawn, seed=new[0].seed, max_new_tokens=12)[0][0].text == new[0].text


def test_samples_depend_on_no_neighbour(small: Path) -> None:
    prompts = ["The", "a = b + c", "", "x" * 20, "import"]
    drawn = SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.3)
    expected, _ = ran(small, prompts, drawn, num_samples=3, max_new_tokens=10, batch_size=1)
    order = [(index, sample) for index in range(5) for sample in range(3)]
    assert [(one.index, one.sample) for one in expected] == order
    assert len({one.text for one in expected}) > 12
    for batch_size in (2, 4, 15, 100):
        found, _ = ran(small, prompts, drawn, num_samples=3, max_new_tokens=10, batch_size=batch_size)
        assert found == expected
    alone, _ = ran(small, [Prompt(prompts[3], 3)], drawn, num_samples=3, max_new_tokens=10)
    assert alone == expected[9:12]


def test_rows_under_all_settings_are_what_they_are_alone(small: Path) -> None:
    """Stop strings, a constraint, log-probabilities; more prompts than rows, which end at different times."""
    pytest.importorskip("llguidance")
    prompts = ["The", "a = b + c", "", "x" * 20, "import", "b", "one two three four", "z"]
    drawn = SamplingConfig(temperature=1.0, top_p=1.0)
    generator = open_generator(small, device="cpu", threads=1)

    def run(batch_size: int, constraint: Constraint | None = None, **values: Any) -> list[Generated]:
        config = configured(max_new_tokens=20, batch_size=batch_size, **values)
        events = generator.generate(prompts, config, drawn, constraint)
        return [event for event in events if isinstance(event, Generated)]

    cases: list[dict[str, Any]] = [
        {"stop": ("e", "1", "of ", "a"), "num_samples": 2},
        {"constraint": Constraint("regex", "([a-c]x?){1,9}", "regex")},
        {"logprobs": 3, "num_samples": 3},
    ]
    for case in cases:
        alone = run(1, **case)
        assert len({one.tokens for one in alone}) > 3 or "logprobs" in case
        for batch_size in (3, 5):
            found = run(batch_size, **case)
            assert [dataclasses.replace(one, logprobs=None) for one in found] == [
                dataclasses.replace(one, logprobs=None) for one in alone
            ]
            for one, other in zip(found, alone, strict=True):
                for token, same in zip(one.logprobs or (), other.logprobs or (), strict=True):
                    assert token.id == same.id
                    assert token.logprob == pytest.approx(same.logprob, abs=1e-5)
    generator.session.close()


def test_no_more_is_done_ahead_than_a_few_batches_of_the_sample_whose_turn_it_is(player: Make) -> None:
    """What is done waits for those before it, so it must be bounded: it is lost when the work is interrupted."""
    model = player([*"ab" * 50, 0])  # the sooner, the longer the prompt
    asked: list[int] = []

    def prompts() -> Iterator[str]:
        for number in range(60):
            asked.append(number)
            yield "z" if number == 0 else "z" * 98

    events = generate(model, prompts(), configured(batch_size=2), GREEDY)
    first = next(event for event in events if isinstance(event, Generated))
    assert (first.index, first.tokens) == (0, 100)
    assert len(asked) == 2 * 8 + 1
    assert [event.index for event in events if isinstance(event, Generated)] == list(range(1, 60))


def test_equal_prompts_draw_texts_of_their_own(small: Path) -> None:
    drawn = SamplingConfig(temperature=1.0, top_p=1.0)
    found, _ = ran(small, ["The"] * 4, drawn, num_samples=2, max_new_tokens=10)
    assert len({one.text for one in found}) == 8


def test_a_sample_comes_as_soon_as_it_and_those_before_it_ended(player: Make) -> None:
    model = player([*"abcdefghijk", 0])  # the sooner, the longer the prompt
    events = list(generate(model, ["zzzz", "z"], configured(), GREEDY))
    places = {event.index: place for place, event in enumerate(events) if isinstance(event, Generated)}
    assert [event.index for event in events[places[0] + 1 :] if isinstance(event, Piece)] == [1, 1, 1]
    events = list(generate(model, ["z", "zzzz"], configured(), GREEDY))
    assert [type(event).__name__ for event in events[-2:]] == ["Generated", "Generated"]


def test_log_probabilities_are_the_models_own(small: Path) -> None:
    (one,), _ = ran(small, "The", SamplingConfig(temperature=0.5, top_k=5), logprobs=3, max_new_tokens=8)
    tokenizer, model = load_tokenizer(small), load_model(small)
    assert one.logprobs is not None
    assert len(one.logprobs) == one.tokens
    ids = tokenizer.encode("The")
    for token in one.logprobs:
        with torch.inference_mode():
            shares = torch.log_softmax(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].double(), -1)
        best = shares.topk(3)
        assert token.logprob == pytest.approx(float(shares[token.id]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [text for text, _ in token.top] == [tokenizer.token_text(item) for item in best.indices.tolist()]
        ids.append(token.id)
    assert tokenizer.decode(ids).endswith(one.text)


# ----------------------------------------------------------------------------------------------------------------
# Prompts that do not fit, models that do not


def test_a_prompt_longer_than_the_context_is_an_error_with_both_lengths(small: Path) -> None:
    text = "one two three four five " * 10
    length = len(load_tokenizer(small).encode(text))
    with pytest.raises(UsageError, match=rf"has {length} tokens, the model's context is 48; --truncate keeps its end"):
        ran(small, text)
    (cut,), _ = ran(small, text, truncate=True, max_new_tokens=10)
    assert cut.prompt_tokens == 38
    assert cut.truncated_tokens == length - 38
    assert cut.finish_reason in ("length", "stop")
    ids = load_tokenizer(small).encode(text)[-38:]
    (same,), _ = ran(small, load_tokenizer(small).decode(ids), max_new_tokens=10)
    assert same.prompt_tokens == 38
    assert same.text == cut.text
    (long,), _ = ran(small, text, truncate=True, max_new_tokens=1000)
    assert (long.prompt_tokens, long.finish_reason) in [(24, "cut"), (24, "stop")]


def test_a_prompt_that_fits_exactly_is_continued_by_one_token(small: Path) -> None:
    tokenizer, session = load_tokenizer(small), TorchSession(load_model(small))
    ids = tokenizer.encode("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2)[:48]
    text = tokenizer.decode(ids)
    assert len(tokenizer.encode(text)) == 48
    (one,) = [
        item for item in Generator(session, tokenizer).generate([text], configured()) if isinstance(item, Generated)
    ]
    assert (one.tokens, one.finish_reason, one.truncated_tokens) in [(1, "cut", 0), (0, "stop", 0)]


def test_one_prompt_that_is_wrong_does_not_stop_the_others(small: Path) -> None:
    prompts = [Prompt("a", 0, "x"), Prompt("long " * 60, 1, "y"), Prompt("\ud800", 2), Prompt("b", 3, 7)]
    prompts.append(Prompt("", 4, None, DataError("was no row")))
    records = [item for item in generate(small, prompts, configured(max_new_tokens=3)) if not isinstance(item, Piece)]
    assert [(type(item).__name__, item.index, item.id) for item in records] == [
        ("Generated", 0, "x"),
        ("Failed", 1, "y"),
        ("Failed", 2, None),
        ("Generated", 3, 7),
        ("Failed", 4, None),
    ]
    told = [str(item.error) for item in records if isinstance(item, Failed)]
    assert "context is 48" in told[0]
    assert "surrogate" in told[1]
    assert told[2] == "was no row"


def test_an_empty_prompt_begins_a_text(small: Path, tmp_path: Path) -> None:
    (one,), _ = ran(small, "", max_new_tokens=2)
    assert one.prompt_tokens == 1
    nameless = make_model(tmp_path / "model", words_tokenizer(tmp_path / "words", {"▁the": 0, "s": 1}))
    with pytest.raises(DataError, match="an empty prompt cannot be continued"):
        ran(nameless, "")


def test_models_that_cannot_generate_say_why(small: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a tokenizer; a model or a run is needed"):
        ran(tokenizer, "a")
    with pytest.raises(DataError, match="no such file or folder"):
        ran(tmp_path / "nowhere", "a")
    narrow = make_model(tmp_path / "narrow", make_seven(tmp_path / "seven"))
    with pytest.raises(DataError, match="the tokenizer has 800 tokens, the model 7"):
        Generator(TorchSession(load_model(narrow)), load_tokenizer(small))
    broken = make_model(tmp_path / "broken", tokenizer, scale=float("nan"))
    with pytest.raises(LlmcliError, match="logits are not finite"):
        ran(broken, "a")
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config\.json:1:2: is not valid JSON"):
        ran(broken, "a")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stop": ("a", "")}, "must not be empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"logprobs": -1}, "logprobs"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(small: Path, values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ran(small, "a", **values)


# ----------------------------------------------------------------------------------------------------------------
# The command


def invoke(model: Path, *words: object, **details: Any) -> Result:
    """The command in this process. Its errors come as exceptions: what becomes of them is tested in test_streams."""
    given = ["-m", str(model), "--threads", "1", *map(str, words)]
    return CliRunner().invoke(command, given, **{"catch_exceptions": False, **details})


def on_terminal(*words: object) -> tuple[int, str]:
    """Runs `llmcli` on a terminal of its own: its exit code and what the terminal got."""
    terminal, end = pty.openpty()
    name = os.ttyname(end)
    life = Life(*words, cwd=ROOT, stdin=name, stdout=name, stderr=name)
    code = life.wait()  # what it writes is less than a terminal holds
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # so ends a terminal that nobody writes to any more
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    return code, shown.decode()


def test_the_command_streams_the_text_and_tells_the_seed(llmcli: Run, small: Path) -> None:
    words = ("generate", "-m", small, "--max-tokens", 12, "--threads", 1, "The", "state")
    first = llmcli(*words)
    assert first.returncode == 0
    number = first.stderr.removeprefix("seed ").strip()
    assert first.stderr == f"seed {number}\n"
    assert first.stdout == ran(small, "The state", DRAWN, seed=int(number), max_new_tokens=12)[0][0].text + "\n"
    again = invoke(small, "--max-tokens", 12, "The state", "--seed", number)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert invoke(small, "--max-tokens", 12, "The state").stdout != first.stdout


def test_greedy_needs_no_seed_and_quiet_says_nothing(small: Path) -> None:
    greedy = invoke(small, "--temp", 0, "--max-tokens", 5, "The")
    assert greedy.stderr == ""
    assert greedy.stdout == ran(small, "The", max_new_tokens=5)[0][0].text + "\n"
    quiet = invoke(small, "-q", "--max-tokens", 100, "The")
    assert quiet.stderr == ""
    assert "model's context is full" in invoke(small, "--max-tokens", 100, "--ignore-eos", "The").stderr


@pytest.mark.parametrize(
    ("words", "piped", "prompt"),
    [
        (["The", "end"], "", "The end"),
        ([], "The end\n", "The end\n"),
        (["-"], "The end\n", "The end\n"),
        (["end"], "The\n", "The\nend"),
        (["end"], "The", "The\nend"),
        (["-p", "end"], "The ", "The end"),
        (["--prompt", "- x"], "", "- x"),
        (["--", "-x"], "", "-x"),
    ],
)
def test_piped_text_and_arguments_are_one_prompt(small: Path, words: list[str], piped: str, prompt: str) -> None:
    found = invoke(small, "--json", "--temp", 0, "--max-tokens", 5, *words, input=piped)
    expected = ran(small, prompt, max_new_tokens=5)[0][0]
    record = json.loads(found.stdout)
    assert (record["text"], record["prompt_tokens"]) == (expected.text, expected.prompt_tokens)


def test_a_real_pipe_is_read(small: Path, llmcli: Run) -> None:
    found = llmcli("generate", "-m", small, "--json", "--temp", 0, "--max-tokens", 3, "end", input="The\n")
    assert json.loads(found.stdout)["text"] == ran(small, "The\nend", max_new_tokens=3)[0][0].text
    assert found.stderr == ""


@pytest.mark.parametrize("stdin", ["null", "closed", "terminal"])
def test_no_prompt_and_no_pipe_is_wrong_usage_and_no_hang(small: Path, stdin: str) -> None:
    told = "Error: there is no prompt: give it as an argument"
    if stdin == "terminal":
        code, shown = on_terminal("generate", "-m", small)
        assert code == 2
        assert shown.startswith(told)
        return
    words = [sys.executable, "-m", "llmcli", "generate", "-m", str(small)]
    shell = f'exec "$@" {"<&-" if stdin == "closed" else "</dev/null"}'
    ended = subprocess.run(
        ["bash", "-c", shell, "bash", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(told)
    assert ended.stderr.count("\n") == 1


def test_json_has_the_documented_keys(small: Path) -> None:
    found = invoke(small, "--json", "-n", 2, "--seed", 5, "--max-tokens", 6, "--logprobs", 2, "The")
    records = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(records) == 2
    for number, record in enumerate(records):
        assert {"text", "prompt_tokens", "tokens", "finish_reason", "seed"} <= set(record)
        assert record["finish_reason"] in ("stop", "length", "cut")
        assert (record["seed"], record["sample"], record["prompt_tokens"]) == (5, number, 1)
        assert len(record["logprobs"]) == record["tokens"]
        assert set(record["logprobs"][0]) == {"id", "token", "logprob", "top"}
        assert len(record["logprobs"][0]["top"]) == 2
    bare = json.loads(invoke(small, "--json", "--max-tokens", 2, "The").stdout)
    assert "logprobs" not in bare
    assert isinstance(bare["seed"], int)  # drawn, and told here


def test_samples_are_set_apart(player: Make) -> None:
    model = player(["one", "\n", "two", 0])
    assert invoke(model, "-n", 3, "--seed", 1, "a").stdout == "one\ntwo\n---\none\ntwo\n---\none\ntwo\n"


def test_logprobs_are_a_line_a_token(player: Make) -> None:
    model = player(["a", "\n", "\t", 0])
    lines = invoke(model, "--temp", 0, "--logprobs", 1, "b").stdout.split("\n")
    assert [line.split("\t") for line in lines[:-1]] == [
        ["a", "0.0000", "a", "0.0000"],
        ["\\n", "0.0000", "\\n", "0.0000"],
        ["\\t", "0.0000", "\\t", "0.0000"],
    ]


def test_stop_strings_may_be_several(player: Make) -> None:
    model = player(["one", " two", " three", 0])
    assert invoke(model, "--temp", 0, "--stop", "ee", "--stop", "o t", "a").stdout == "one tw\n"


def test_a_long_prompt_is_cut_only_when_asked(small: Path) -> None:
    text = "one two three four five " * 10
    with pytest.raises(UsageError, match="the model's context is 48"):
        invoke(small, "--temp", 0, text)
    found = invoke(small, "--temp", 0, "--truncate", "--max-tokens", 4, "-n", 2, text)
    left = ran(small, text, truncate=True, max_new_tokens=4)[0][0].truncated_tokens
    assert found.stderr == f"The first {left:,} tokens of the prompt were left out.\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "-p", "b"], "two prompts"),
        (["-i", "x.jsonl"], "go together"),
        (["-o", "x.jsonl"], "go together"),
        (["-i", "x.jsonl", "-o", "y.jsonl", "a"], "a prompt and an --input"),
        (["a", "--stop", ""], "stop string must not be empty"),
        (["a", "--repetition-penalty", "1e-45"], "must be at least 0.01"),
        (["a", "--temperature", "nan"], "must be a number"),
        (["a", "--top-p", "0"], "must be greater than 0"),
    ],
)
def test_wrong_usage_is_told(small: Path, words: list[str], told: str) -> None:
    with pytest.raises(LlmcliError, match=told) as caught:
        invoke(small, *words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("words", [[], ["-"]])
def test_a_pipe_that_brings_nothing_is_no_prompt(small: Path, words: list[str]) -> None:
    with pytest.raises(DataError, match="<stdin>: is empty") as caught:
        invoke(small, "--temp", 0, *words, input="")
    assert caught.value.exit_code == 2
    assert invoke(small, "--temp", 0, "a", input="").stdout == invoke(small, "--temp", 0, "a").stdout
    assert invoke(small, "--temp", 0, *words, input="a").stdout == invoke(small, "--temp", 0, "a").stdout


def test_a_closed_pipe_ends_quietly(small: Path) -> None:
    words = f"{sys.executable} -m llmcli generate -m {small} -n 300 --max-tokens 8 --seed 1 --threads 1 The"
    ended = subprocess.run(
        ["bash", "-c", f"({words} </dev/null; echo $? >&2) | head -1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stderr == "0\n"
    assert ended.stdout


ATTACK = ["ok", "\x1b", "]52;c;ZXZpbA==", "\x07", "\x1b", "[2J", "\u009b", "31m", "\u202e", "\x08", "\r", "end"]


def test_a_terminal_gets_no_control_characters(player: Make) -> None:
    """Of a model whose tokens spell escape sequences, each cut into several; a pipe gets them as they are."""
    model = player([*ATTACK, 0])
    words = ("generate", "-m", model, "--temp", 0, "--threads", 1, "a")
    assert on_terminal(*words) == (0, "ok]52;c;ZXZpbA==[2J31mend\r\n")  # the terminal's own line end
    assert invoke(model, "--temp", 0, "a").stdout == "".join(ATTACK) + "\n"
    assert "\x1b" not in invoke(model, "--temp", 0, "--json", "a").stdout


def test_a_console_that_is_not_utf8_gets_what_it_can_show(player: Make) -> None:
    words = ["-m", str(player(["春", "é", "a", 0])), "--threads", "1", "--temp", "0", "a"]
    assert CliRunner(charset="latin-1").invoke(command, words, catch_exceptions=False).stdout == "?éa\n"


# ----------------------------------------------------------------------------------------------------------------
# Files of prompts

PROMPTS = [
    {"id": "first", "prompt": "The state"},
    {"id": 2, "prompt": "a"},
    {"prompt": "no id"},
    {"id": "long", "prompt": "one two three " * 40},
    {"id": 5.5, "prompt": "春眠"},
    {"id": "none", "text": "there is no prompt"},
    {"id": "\ud800", "prompt": "an id that is no text"},
    {"id": "last", "prompt": "z"},
]


def rows(path: Path, content: Sequence[object] = PROMPTS) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in content))
    return path


def continued(model: Path, source: object, output: Path, sampling: SamplingConfig = DRAWN, **values: Any) -> FileReport:
    """Runs to the end."""
    overwrite = values.pop("overwrite", False)
    config = configured(**{"max_new_tokens": 6, "seed": 3, "batch_size": 2, **values})
    *_, report = generate_file(model, str(source), output, config, sampling, overwrite=overwrite)
    assert isinstance(report, FileReport)
    return report


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_file_of_prompts_keeps_ids_order_and_errors(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "deep" / "out.jsonl"
    report = continued(small, source, output, num_samples=2)
    assert dataclasses.replace(report, tokens=0) == FileReport(str(output), 8, 2, 0, 3)
    found = records(output)
    expected = [
        (item.get("id"), index) for index, item in enumerate(PROMPTS) for _ in range(1 if index in (3, 5) else 2)
    ]
    assert [(item.get("id"), item["index"]) for item in found] == expected
    assert "id" not in found[4]
    wrong = {item["index"]: item["error"] for item in found if "error" in item}
    assert "context is 48" in wrong[3]["message"]
    assert wrong[5] == {
        "kind": "data",
        "message": "the field 'prompt' is missing; the fields are: 'id', 'text'",
        "where": f"{source}:6",
    }
    fine = [item for item in found if "error" not in item]
    assert sum(item["tokens"] for item in fine) == report.tokens
    for item in fine:
        prompt = Prompt(PROMPTS[item["index"]]["prompt"], item["index"])  # type: ignore[arg-type]
        texts = [one.text for one in ran(small, [prompt], DRAWN, seed=3, num_samples=2, max_new_tokens=6)[0]]
        assert item["text"] == texts[item["sample"]]
        assert {"text", "prompt_tokens", "tokens", "finish_reason", "seed"} <= set(item)


def test_rows_of_strangers_are_lost_one_by_one(small: Path, tmp_path: Path) -> None:
    source = rows(
        tmp_path / "in.jsonl",
        [
            "{",
            "[1]",
            "",
            '{"prompt": 7}',
            '{"prompt": null}',
            '{"prompt": "a", "prompt": "b"}',
            '{"prompt": "half \\ud800"}',
            '{"id": NaN, "prompt": "a"}',
            '{"id": 1e999, "prompt": "a"}',
            '{"id": {"a": 1}, "prompt": "a"}',
            '{"id": ' + "[" * 600 + "]" * 600 + ', "prompt": "a"}',
            '{"id": 1, "\\ud800": 1}',
            '{"id": "ok", "prompt": "a"}',
        ],
    )
    report = continued(small, source, tmp_path / "out.jsonl")
    assert (report.prompts, report.failed) == (12, 11)
    found = records(tmp_path / "out.jsonl")
    assert [item["index"] for item in found] == list(range(12))
    assert found[-1]["id"] == "ok"
    assert found[-1]["text"]
    assert [item["error"]["where"].removeprefix(f"{source}:") for item in found[:3]] == ["1:2", "2", "4"]
    assert all("\n" not in item["error"]["message"] for item in found[:-1])


def test_the_command_on_a_file_exits_2_where_rows_failed(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    words = ("-i", source, "-o", output, "--max-tokens", 3)
    with pytest.raises(DataError, match=r"2 of 8 prompts failed; their records say why"):
        invoke(small, *words)
    seed = records(output)[0]["seed"]
    told = invoke(small, *words, catch_exceptions=True)  # it is complete: nothing is done again
    assert isinstance(told.exception, DataError)
    assert told.stderr.splitlines() == [
        f"seed {seed}",
        f"8 prompts stand in {output} already",
        f"{output}: 8 prompts, 2 failed; 0 tokens",
    ]
    rows(source, [item for item in PROMPTS if item.get("id") not in ("long", "none")])
    fine = invoke(small, "--json", *words, "--overwrite", "--temp", 0)
    assert set(json.loads(fine.stdout)) == {"output", "prompts", "failed", "tokens", "seed", "cut"}
    assert (fine.exit_code, fine.stderr) == (0, "")
    assert invoke(small, "-q", *words, "--temp", 0, "--overwrite").stderr == ""


def test_another_field_and_other_sources(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl", [{"q": "The"}, {"q": "a"}]), tmp_path / "out.jsonl"
    invoke(small, "-i", source, "-o", output, "--prompt-field", "q", "--seed", 1, "--max-tokens", 3)
    whole = output.read_bytes()
    piped = tmp_path / "piped.jsonl"
    invoke(
        small, "-i", "-", "-o", piped, "--prompt-field", "q", "--seed", 1, "--max-tokens", 3, input=source.read_text()
    )
    assert piped.read_bytes() == whole
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(source.read_bytes(),), daemon=True)
    writer.start()
    for other in ("in.jsonl.gz", "pipe"):
        output.unlink()
        invoke(small, "-i", tmp_path / other, "-o", output, "--prompt-field", "q", "--seed", 1, "--max-tokens", 3)
        assert output.read_bytes() == whole
    writer.join(30)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 3), (3, 4)])
def test_a_run_that_was_cut_anywhere_ends_with_the_same_bytes(
    small: Path, tmp_path: Path, num_samples: int, batch_size: int
) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    settings = {"num_samples": num_samples, "batch_size": batch_size, "seed": None}
    config = configured(max_new_tokens=6, **settings)
    started, *_ = list(generate_file(small, str(source), output, config))
    assert isinstance(started, FileStarted)
    whole = output.read_bytes()
    assert f'"seed": {started.seed}'.encode() in whole
    ends = [0]
    while ends[-1] < len(whole):
        ends.append(whole.index(b"\n", ends[-1]) + 1)
    cuts = {end + shift for end in ends for shift in (-1, 0, 2)} | {end + 100 for end in ends[::5]} | {1}
    for cut in sorted(cuts & set(range(1, len(whole) + 1))):
        output.write_bytes(whole[:cut])
        # The seed that was drawn is taken from what stands there, from the first whole record on.
        known = cut >= ends[1]
        report = continued(small, source, output, **{**settings, "seed": None if known else started.seed})
        assert report.seed == started.seed
        assert output.read_bytes() == whole, cut


@pytest.mark.parametrize("quantizer", ["fp32", "int8", "weight-only", "int4"])
def test_on_a_graph_the_bytes_are_the_same_to_the_last_digit(small: Path, tmp_path: Path, quantizer: str) -> None:
    """Whoever the neighbours are, before and after an interruption. (int4 is in blocks of 32 here.)"""
    precision = "int8" if quantizer == "weight-only" else quantizer
    config = ExportConfig(
        precision=precision,
        quantizer="weight-only" if quantizer == "weight-only" else "auto",
        check=False,
        threads=1,
    )
    list(export(small, tmp_path / "graph", config))
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    settings: dict[str, Any] = {"logprobs": 2, "batch_size": 3, "num_samples": 2, "max_new_tokens": 12}
    continued(tmp_path / "graph", source, output, **settings)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (1, 2, 5, 8, 13):
        output.write_bytes(b"".join(lines[:kept]))
        continued(tmp_path / "graph", source, output, **settings)
        assert output.read_bytes() == whole, kept
    for batch_size in (1, 7):
        continued(tmp_path / "graph", source, output, **{**settings, "batch_size": batch_size}, overwrite=True)
        assert output.read_bytes() == whole, batch_size


def test_only_what_is_missing_is_done_again(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    whole = continued(small, source, output)
    content = output.read_bytes()
    lines = content.splitlines(keepends=True)
    done = sum(json.loads(line).get("tokens", 0) for line in lines[:5])
    output.write_bytes(b"".join(lines[:5]))
    config = configured(max_new_tokens=6, seed=3, batch_size=2)
    started, *_, report = generate_file(small, str(source), output, config)
    assert started == FileStarted(3, 5)
    assert isinstance(report, FileReport)
    assert (report.tokens, report.failed) == (whole.tokens - done, whole.failed)
    assert continued(small, source, output).tokens == 0
    assert output.read_bytes() == content


def test_rows_that_were_added_are_continued(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl", PROMPTS[:5]), tmp_path / "out.jsonl"
    continued(small, source, output)
    rows(source)
    continued(small, source, output)
    continued(small, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_killed_run_goes_on_where_it_stood(small: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", [{"id": number, "prompt": f"The {number}"} for number in range(60)])
    output = tmp_path / "out.jsonl"
    words = ["-m", str(small), "-i", str(source), "-o", str(output), "--seed", "3", "--max-tokens", "20"]
    words += ["--batch-size", "2", "--threads", "1", "--ignore-eos"]
    for _ in range(5):  # again, should it have ended before it was killed
        output.unlink(missing_ok=True)
        life = Life("generate", *words, cwd=tmp_path)
        until(lambda: output.exists() and output.read_bytes().count(b"\n") > 2, life)
        life.signal(signal.SIGKILL)
        code = life.wait()
        if code == -signal.SIGKILL:
            break
    assert code == -signal.SIGKILL
    assert output.read_bytes().count(b"\n") < 60
    values = {"max_new_tokens": 20, "ignore_eos": True}
    continued(small, source, output, **values)
    continued(small, source, tmp_path / "whole.jsonl", **values)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_after_a_full_disk_it_goes_on(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    words = ["-m", small, "-i", source, "-o", output, "--seed", 3, "--max-tokens", 6, "--batch-size", 2, "--threads", 1]
    ended = run("generate", *words, cwd=tmp_path, limit=1024, code=1)
    assert ended.stderr == f"Error: {output}: no space left to write; free some and run it again\n"
    assert 0 < output.stat().st_size <= 1024
    continued(small, source, output)
    continued(small, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"notes of mine\n",
        b'{"id": 1, "text": "mine"}\n',
        b'{"id": 1, "text": "mine"}',
        b"[1, 2]\n",
        b"7\n",
        b'"index"\n',
        b"\xff\xfe\x00",
        b'{"index": -1, "key": "", "seed": 1}\n',
        b'{"index": 0, "key": "", "seed": 1}\n',
        b'{"index": 0, "key": "", "seed": "1"}\n',
        b'{"index": 0, "key": "", "seed": 1.5}\n',
        b'{"index": "0", "key": "", "seed": 1}\n',
        b'{"index": 5, "key": "", "seed": 1}\n',
        b'{"index": true, "key": "", "seed": 1}\n',
        b"[" * 5000 + b"\n",
        b"\n",
    ],
    ids=range(16),
)
def test_a_file_of_somebody_else_is_refused_and_untouched(small: Path, tmp_path: Path, content: bytes) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    output.write_bytes(content)
    for seed in (3, None):
        with pytest.raises(UsageError, match=r"out\.jsonl:1: .*--overwrite"):
            continued(small, source, output, seed=seed)
    assert output.read_bytes() == content
    continued(small, source, output, overwrite=True)
    assert len(records(output)) == 8


@pytest.mark.parametrize("lines", [8, 3, 1])
def test_an_output_of_another_model_setting_or_input_is_refused_and_untouched(
    small: Path, tokenizer: Path, tmp_path: Path, lines: int
) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    continued(small, source, output)
    whole = b"".join(output.read_bytes().splitlines(keepends=True)[:lines])
    output.write_bytes(whole)
    other = make_model(tmp_path / "other", tokenizer, context=48, seed=1)
    changed: list[dict[str, Any]] = [
        {"num_samples": 2},
        {"max_new_tokens": 7},
        {"seed": 4},
        {"stop": ("x",)},
        {"sampling": GREEDY},
        {"model": other},
    ]
    for change in changed:
        model, sampling = change.pop("model", small), change.pop("sampling", DRAWN)
        for batch_size in (2, 8):
            with pytest.raises(UsageError, match=r"out\.jsonl:1: its records are of another model, setting or input"):
                continued(model, source, output, sampling, batch_size=batch_size, **change)
            assert output.read_bytes() == whole
    if lines > 1:
        for row in ({"id": 2, "prompt": "another"}, {"id": 3, "prompt": "a"}, {"id": 2}):
            rows(source, [PROMPTS[0], row, *PROMPTS[2:]])
            with pytest.raises(UsageError, match=r"out\.jsonl:2: its records are of another"):
                continued(small, source, output)
        rows(source, PROMPTS[: lines - 1])
        with pytest.raises(UsageError, match="holds more prompts than the input"):
            continued(small, source, output)
        assert output.read_bytes() == whole


def test_a_tokenizer_that_changed_is_another_model(small: Path, tmp_path: Path) -> None:
    source, output, model = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", tmp_path / "model"
    model.mkdir()
    for path in small.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    continued(model, source, output)
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UsageError, match="another model"):
        continued(model, source, output)


def test_the_machine_may_change_between_runs(small: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    continued(small, source, output)
    whole = records(output)
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:3]))
    continued(small, source, output, batch_size=5)
    assert records(output) == whole


def test_outputs_that_are_no_file_are_refused(small: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked.jsonl").hardlink_to(source)
    for output, told in (
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is a folder or a device"),
        (tmp_path / "pipe", "is a folder or a device"),
        (source, "is the input as well"),
        (tmp_path / "linked.jsonl", "is the input as well"),
    ):
        with pytest.raises(UsageError, match=told):
            continued(small, source, output)
    assert records(source) == PROMPTS


def test_inputs_that_are_none_are_errors_and_no_output_appears(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    for name, told in (("nowhere.jsonl", "no such file"), ("empty.jsonl", "is empty"), ("blank.jsonl", "no rows")):
        with pytest.raises(DataError, match=told):
            continued(small, tmp_path / name, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_that_is_broken_leaves_the_output_as_it_was(tokenizer: Path, tmp_path: Path) -> None:
    source, output = rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    broken = make_model(tmp_path / "broken", tokenizer, scale=float("nan"))
    with pytest.raises(LlmcliError, match="not finite"):
        continued(broken, source, output)
    assert not output.exists()


def test_the_session_is_open_to_be_used_again(small: Path) -> None:
    generator = open_generator(small, device="cpu", threads=1)
    results = [
        [
            item
            for item in generator.generate(["The"], configured(max_new_tokens=5), GREEDY)
            if isinstance(item, Generated)
        ]
        for _ in range(2)
    ]
    assert results[0] == results[1]
    generator.session.close()
