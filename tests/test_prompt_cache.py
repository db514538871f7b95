"""Prompt caches: the same text from fewer tokens; files of another model or prompt, and damaged ones, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from small_model import make_model
from small_tokenizer import make_tokenizer

from llmcli.config import ChatConfig, GenerateConfig, SamplingConfig
from llmcli.data.chat_template import ChatTemplate
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.atomic import write_file
from llmcli.files.manifest import write_manifest
from llmcli.files.prompt_cache import CachedPrompt, model_key, read_prompt, write_prompt
from llmcli.operations.chat import Answer, Chat
from llmcli.operations.generate import Generated, generate, open_generator
from llmcli.operations.prompt_cache import PromptCache
from llmcli.runtime.prefix import Prefix, common_length
from llmcli.runtime.torch_session import open_session

GREEDY, DRAWN = SamplingConfig(temperature=0), SamplingConfig(temperature=1.0, top_p=1.0)
SYSTEM = "You know the names of all the functions of the standard library, and what each of them is for. "


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that may hold 200 tokens."""
    folder = tmp_path_factory.mktemp("small")
    return make_model(folder / "model", make_tokenizer(folder / "tokenizer"), context=200)


def made(
    model: Path, prompt: str, cache: Path | None, sampling: SamplingConfig = GREEDY, **values: Any
) -> list[Generated]:
    config = GenerateConfig(**{"threads": 1, "seed": 0, "max_new_tokens": 12, **values})
    records = generate(model, prompt, config, sampling, prompt_cache=cache)
    return [record for record in records if isinstance(record, Generated)]


def length(model: Path, text: str) -> int:
    return len(load_tokenizer(model).encode(text))


# ----------------------------------------------------------------------------------------------------------------
# The session's two methods


def test_a_row_that_is_exported_and_imported_goes_on_as_it_was(small: Path) -> None:
    session = open_session(small, threads=1)
    prompts: Sequence[Sequence[int]] = [[5, 6, 7, 8, 9, 10], [11, 12]]
    session.start(prompts)
    states = session.export_row(0)
    assert len(states) == 4
    assert all(array.shape == (1, 6, 8) and array.dtype == np.float32 for array in states)
    expected = session.feed(np.array([[20, 21], [20, 21]], np.int64), 2)[0]
    other = open_session(small, threads=1)
    other.import_row(states)
    assert other.lengths == [6]
    np.testing.assert_allclose(other.feed(np.array([[20, 21]], np.int64), 2)[0], expected, atol=1e-5)
    other.import_row([array[:, :2] for array in states])  # the begin alone
    assert other.lengths == [2]
    whole = session.start([[5, 6, 30]])
    np.testing.assert_allclose(other.feed(np.array([[30]], np.int64))[:, -1], whole, atol=1e-5)
    copies = [array.copy() for array in states]
    other.feed(np.full((1, 150), 3, np.int64))
    for array, copy in zip(states, copies, strict=True):  # they are no views of the cache
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("change", ["fewer", "heads", "uneven", "long", "none", "flat"])
def test_states_that_do_not_fit_are_refused(small: Path, change: str) -> None:
    session = open_session(small, threads=1)
    session.start([[5, 6, 7]])
    states = session.export_row(0)
    wrong = {
        "fewer": states[:-1],
        "heads": [np.concatenate([array, array]) for array in states],
        "uneven": [*states[:-1], states[-1][:, :2]],
        "long": [np.zeros((1, 201, 8), np.float32) for _ in states],
        "none": [],
        "flat": [array[0] for array in states],
    }
    with pytest.raises(DataError, match=r"are needed|context of 200"):
        session.import_row(wrong[change])
    assert session.lengths == [3]  # as it was


# ----------------------------------------------------------------------------------------------------------------
# Generation


def test_the_second_call_reads_only_what_is_new_and_says_the_same(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "system.cache"
    (first,) = made(small, SYSTEM + "Why?", cache)
    assert (first.cached_tokens, first.prompt_tokens) == (0, length(small, SYSTEM + "Why?"))
    content = cache.read_bytes()
    (again,) = made(small, SYSTEM + "Why?", cache)
    assert again.cached_tokens == first.prompt_tokens - 1  # the last one is fed for its logits
    assert again.text == first.text == made(small, SYSTEM + "Why?", None)[0].text
    (other,) = made(small, SYSTEM + "And where are they to be found?", cache)
    tokenizer = load_tokenizer(small)
    shared = common_length(*(tokenizer.encode(SYSTEM + end) for end in ("Why?", "And where are they to be found?")))
    assert other.cached_tokens == shared > 20
    assert other.text == made(small, SYSTEM + "And where are they to be found?", None)[0].text
    assert made(small, SYSTEM[:20], cache)[0].text == made(small, SYSTEM[:20], None)[0].text
    assert cache.read_bytes() == content  # it is written once
    assert made(small, SYSTEM, None)[0].cached_tokens is None


def test_samples_and_their_batches_share_the_cached_prompt(small: Path, tmp_path: Path) -> None:
    prompt, values = SYSTEM + "Why?", {"num_samples": 5, "batch_size": 2}
    expected = [one.text for one in made(small, prompt, None, DRAWN, **values)]
    for cached in (0, length(small, prompt) - 1):
        found = made(small, prompt, tmp_path / "a.cache", DRAWN, **values)
        assert [one.text for one in found] == expected
        assert found[0].cached_tokens == cached


def test_fewer_tokens_are_fed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(small, SYSTEM + "Why?", tmp_path / "a.cache")
    generator = open_generator(small, threads=1)
    fed: list[int] = []
    feed, start = generator.session.feed, generator.session.start
    monkeypatch.setattr(generator.session, "feed", lambda ids, keep=1: (fed.append(ids.size), feed(ids, keep))[1])
    monkeypatch.setattr(generator.session, "start", lambda ids: (fed.append(-1), start(ids))[1])
    cache = PromptCache(tmp_path / "a.cache", small)
    ids = generator.tokenizer.encode(SYSTEM + "Why not?")
    logits = cache.prefill(generator.session, ids)
    assert fed == [len(ids) - cache.reused]
    assert cache.reused > 20
    np.testing.assert_allclose(logits, start([ids]), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------
# The file


def test_the_file_opens_elsewhere(small: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    made(small, SYSTEM, tmp_path / "a.cache")
    tensors = load_file(tmp_path / "a.cache")
    ids = load_tokenizer(small).encode(SYSTEM)
    assert tensors["tokens"].tolist() == ids
    assert sorted(tensors) == [*(f"layers.{layer}.{kind}" for layer in (0, 1) for kind in ("keys", "values")), "tokens"]
    assert tensors["layers.1.values"].shape == (1, len(ids), 8)
    session = open_session(small, threads=1)
    session.start([ids])
    np.testing.assert_array_equal(tensors["layers.0.keys"], session.export_row(0)[0])


def test_a_file_of_another_model_or_prompt_is_refused(small: Path, tmp_path: Path) -> None:
    made(small, SYSTEM, tmp_path / "a.cache")
    other = make_model(tmp_path / "other", small, seed=1, context=200)
    with pytest.raises(UsageError, match=r"a\.cache: is the prompt cache of another model"):
        made(other, SYSTEM, tmp_path / "a.cache")
    with pytest.raises(UsageError, match=r"a\.cache: holds another prompt"):
        made(small, "None of it: " + SYSTEM, tmp_path / "a.cache")
    with pytest.raises(UsageError, match="goes with one prompt"):
        list(generate(small, ["a", "b"], GenerateConfig(), prompt_cache=tmp_path / "a.cache"))


def test_the_models_key_is_that_of_its_files(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    key = model_key(copy)
    assert key == model_key(small)
    write_manifest(copy, {})
    assert model_key(copy) == key  # by the manifest now
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert model_key(copy) != key
    (small / "README.md").write_text("of no effect")
    assert model_key(small) == key


def test_a_damaged_file_is_refused_whatever_is_wrong(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    made(small, SYSTEM[:8], path)
    whole = path.read_bytes()
    head = int.from_bytes(whole[:8], "little") + 8
    # Each byte of the header has a say, but for the spaces that fill it up; of the numbers a few are tried.
    places = [place for place in range(head) if whole[place : place + 1] != b" "]
    for place in [*places[::7], *range(head, len(whole), 97), len(whole) - 1]:
        write_file(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((DataError, UsageError)) as caught:
            made_from(path, small)
        assert "\n" not in str(caught.value)
    for cut in (0, 7, head - 1, head, len(whole) - 1):
        write_file(path, whole[:cut])
        with pytest.raises(DataError, match="is not a valid safetensors file"):
            read_prompt(path)
    shutil.copy(small / "model.safetensors", path)
    with pytest.raises(DataError, match="is not a prompt cache"):
        read_prompt(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_prompt(path)


def made_from(path: Path, model: Path) -> None:
    """What the command does before it loads the weights, and the import of what was read."""
    cache = PromptCache(path, model)
    session = open_session(model, threads=1)
    cache.fill(Prefix(session), load_tokenizer(model).encode(SYSTEM[:8]))


def test_states_of_other_shapes_under_the_right_key_are_refused(small: Path, tmp_path: Path) -> None:
    write_prompt(tmp_path / "a", CachedPrompt(model_key(small), [5, 6, 7], [np.zeros((2, 3, 8), np.float32)] * 4))
    session = open_session(small, threads=1)
    with pytest.raises(DataError, match=r"a: does not fit the model"):
        PromptCache(tmp_path / "a", small).prefill(session, [5, 6, 7, 8])


# ----------------------------------------------------------------------------------------------------------------
# Chat and the command


def test_a_chat_begins_with_what_the_file_holds(small: Path, tmp_path: Path) -> None:
    answers = []
    for question in ("Why?", "Why?", "Where?"):
        template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {})
        config = ChatConfig(threads=1, seed=0, max_new_tokens=6)
        cache = PromptCache(tmp_path / "a.cache", small)
        chat = Chat(open_generator(small, threads=1), template, config, GREEDY, system=SYSTEM, prompt_cache=cache)
        (answer,) = [record for record in chat.ask(question) if isinstance(record, Answer)]
        (second,) = [record for record in chat.ask("And?") if isinstance(record, Answer)]
        assert second.cached_tokens >= answer.prompt_tokens
        chat.close()
        answers.append(answer)
    assert answers[0].content == answers[1].content
    assert answers[0].cached_tokens == 0
    assert answers[1].cached_tokens == answers[1].prompt_tokens - 1
    assert 20 < answers[2].cached_tokens < answers[2].prompt_tokens - 1


def test_the_command_tells_what_came_from_the_file(small: Path, tmp_path: Path, llmcli: Run) -> None:
    words = ("generate", "-m", small, "--seed", 1, "--threads", 1, "--max-tokens", 4, "--prompt-cache", tmp_path / "c")
    count = length(small, SYSTEM)
    found = llmcli(*words, SYSTEM)
    assert found.returncode == 0
    assert f"0 of {count} tokens of the prompt were in " in found.stderr
    again = llmcli(*words, "--json", SYSTEM)
    record = json.loads(again.stdout)
    assert record["cached_tokens"] == count - 1
    assert record["text"] + "\n" == found.stdout
    wrong = llmcli(*words, "something else")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    wrong = llmcli(*words, "-i", "a", "-o", "b")
    assert wrong.returncode == 2
    assert "goes with one prompt" in wrong.stderr
