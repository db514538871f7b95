"""The onnxruntime session beside the torch session, which test_families and others hold against transformers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import completed

from llmcli.errors import DataError, UsageError
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.folder import load_config, load_model, save_model
from llmcli.onnx.folder import write_graph
from llmcli.onnx.quantize import Plan
from llmcli.runtime.onnx_session import OnnxSession, Rows
from llmcli.runtime.torch_session import TorchSession
from llmcli.runtime.torch_session import open_session as open_torch

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 80,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-llama3": {"rope_scaling": LLAMA3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-odd": {"hidden_size": 36, "head_dim": 10, "intermediate_size": 50},  # no block divides these
    "qwen3": {"head_dim": 32},
    "qwen3-odd": {"head_dim": 6},
    "gpt2-odd": {"hidden_size": 40, "num_key_value_heads": 4, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"attention_bias": True, "tie_word_embeddings": False},
    "gpt2": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
}


def make_model(folder: Path, family: str = "llama", scale: float = 0.2, **more: Any) -> Path:
    """A model folder whose every weight is drawn."""
    shape = {**SHAPE, **FAMILIES[family], **more}
    model = Decoder(DecoderConfig(model_type=family.partition("-")[0], **shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, scale, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, special_ids={"eos_token_id": 0})
    return folder


def make_onnx(model: Path, **plan: Any) -> Path:
    """The model's graph, in a folder beside it."""
    folder = model.with_name(f"{model.name}-onnx-{'-'.join(map(str, plan.values()))}")
    folder.mkdir()
    for _ in write_graph(model, load_config(model), Plan(**plan), folder):
        pass
    return folder


def both(tmp_path: Path, family: str = "llama", **plan: Any) -> tuple[TorchSession, OnnxSession]:
    model = make_model(tmp_path / family, family)
    return open_torch(model, device="cpu", threads=1), OnnxSession(make_onnx(model, **plan), threads=1)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return [int(number) for number in np.random.default_rng(seed).integers(0, 97, count)]


# ----------------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_gives_what_torch_gives(tmp_path: Path, family: str, portable: bool) -> None:
    theirs, ours = both(tmp_path, family, portable=portable)

    def compare(call: Any) -> None:
        assert np.abs(call(ours) - call(theirs)).max() < 1e-3
        assert ours.lengths == theirs.lengths

    for prompts in ([ids_of(1)], [ids_of(9)], [ids_of(33)], [ids_of(5), ids_of(20, 1), ids_of(1, 2)]):
        compare(lambda session, prompts=prompts: session.start(prompts))
        rows = len(prompts)
        for count, keep in ((1, 1), (1, 1), (3, 2), (1, 1), (4, 4)):
            fed = np.array([ids_of(count, 10 * row + count) for row in range(rows)])
            compare(lambda session, fed=fed, keep=keep: session.feed(fed, keep))


@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
def test_the_cache_grows_to_the_context_and_no_further(tmp_path: Path, portable: bool) -> None:
    theirs, ours = both(tmp_path, portable=portable)
    for session in (theirs, ours):
        session.start([[5]])
    for place in range(79):
        fed = np.array([[place % 97]])
        assert np.abs(ours.feed(fed) - theirs.feed(fed)).max() < 1e-3
    for session in (theirs, ours):
        with pytest.raises(UsageError, match="81 tokens do not fit the model's context of 80"):
            session.feed(np.array([[1]]))
        assert session.lengths == [80]
    with pytest.raises(UsageError, match="81 tokens"):
        ours.start([ids_of(81)])
    assert np.abs(ours.start([ids_of(80)]) - theirs.start([ids_of(80)])).max() < 1e-3


@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
def test_rewinding_forgets_and_selecting_copies_rows(tmp_path: Path, portable: bool) -> None:
    theirs, ours = both(tmp_path, "qwen3", portable=portable)
    for session in (theirs, ours):
        session.start([ids_of(12), ids_of(7, 1), ids_of(9, 2)])
        session.rewind([4, 7, 5])
        session.select([2, 0, 2])
        assert session.lengths == [5, 4, 5]
    fed = np.array([ids_of(3, 4), ids_of(3, 5), ids_of(3, 6)])
    assert np.abs(ours.feed(fed, 3) - theirs.feed(fed, 3)).max() < 1e-3
    for session in (theirs, ours):
        session.rewind(2)
        assert session.lengths == [2, 2, 2]
    one = fed[:, :1]
    assert np.abs(ours.feed(one) - theirs.feed(one)).max() < 1e-3


@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_row_takes_a_new_prompt_or_a_copy_of_another_while_the_others_stay(
    tmp_path: Path, family: str, portable: bool
) -> None:
    theirs, ours = both(tmp_path, family, portable=portable)
    one = np.array([[3], [4], [5]])
    for session in (theirs, ours):
        session.start([ids_of(12), ids_of(7, 1), ids_of(9, 2)])
        before = session.feed(one)[:, -1]
        replaced = session.replace(1, ids_of(70, 3))  # the cache has to grow
        assert session.lengths == [13, 70, 10]
        session.copy(0, 2, 5)
        session.copy(0, 0, 5)
        assert session.lengths == [5, 70, 5]
        after = session.feed(one)[:, -1]
        assert np.abs(session.start([ids_of(70, 3)])[0] - replaced).max() < 1e-4
        assert np.abs(session.feed(one[1:2])[0, -1] - after[1]).max() < 1e-4
        session.start([ids_of(12)[:5]])
        assert np.abs(session.feed(one[:1])[0, -1] - after[0]).max() < 1e-4
        session.rewind(5)
        assert np.abs(session.feed(one[2:])[0, -1] - after[2]).max() < 1e-4
        session.start([ids_of(12)])
        assert np.abs(session.feed(one[:1])[0, -1] - before[0]).max() < 1e-4
        for prompt, told in (([], "at least one token"), (ids_of(81), "81 tokens do not fit")):
            with pytest.raises(UsageError, match=told):
                session.replace(0, prompt)
        assert session.lengths == [13]
        session.close()
        with pytest.raises(UsageError, match="not started"):
            session.replace(0, [1])


@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
def test_a_row_that_is_exported_and_imported_goes_on_as_it_was(tmp_path: Path, portable: bool) -> None:
    model = make_model(tmp_path / "llama")
    folder = make_onnx(model, portable=portable)
    session, other = (OnnxSession(folder, threads=1) for _ in range(2))
    session.start([ids_of(6), ids_of(2, seed=1)])
    states = session.export_row(0)
    next_ids = np.array([ids_of(2, seed=2)] * 2, np.int64)
    expected = session.feed(next_ids, 2)[0]
    other.import_row(states)
    assert other.lengths == [6]
    np.testing.assert_allclose(other.feed(next_ids[:1], 2)[0], expected, atol=1e-5)
    other.import_row([array[:, :2] for array in states])  # the begin alone
    whole = session.start([[*ids_of(6)[:2], 3]])
    np.testing.assert_allclose(other.feed(np.array([[3]], np.int64))[:, -1], whole, atol=1e-5)
    for wrong in ([], states[:-1], [array[0] for array in states], [array[:, :0] for array in states]):
        with pytest.raises(DataError):
            other.import_row(wrong)
    assert other.lengths == [3]  # as it was


def test_scores_are_those_of_torch_and_leave_the_rows_alone(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path)
    ids = np.array([ids_of(81), ids_of(81, 1)])
    wanted = np.zeros((2, 80), np.bool_)
    wanted[0, 30:] = True
    wanted[1, [0, 5, 40]] = True
    ours.start([ids_of(4)])
    found = ours.score(ids, wanted)
    assert np.abs(found - theirs.score(ids, wanted)).max() < 1e-3
    assert not found[~wanted].any()
    assert ours.lengths == [4]
    with pytest.raises(UsageError, match="81 tokens"):
        ours.score(np.zeros((1, 82), np.int64), np.ones((1, 81), np.bool_))


def test_what_was_not_started_says_so(tmp_path: Path) -> None:
    _, ours = both(tmp_path)
    with pytest.raises(UsageError, match="not started"):
        ours.feed(np.array([[1]]))
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(UsageError, match="at least one token"):
            ours.start(prompts)
    ours.start([[1, 2]])
    ours.close()
    assert ours.lengths == []
    with pytest.raises(UsageError, match="not started"):
        ours.feed(np.array([[1]]))


# ----------------------------------------------------------------------------------------------------------------
# Rows

PLANS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8", "few": 0},
    "int8 weight-only": {"precision": "int8", "weight_only": True},
    "int4": {"precision": "int4", "block_size": 32},
    "portable": {"portable": True},
    "portable int8": {"portable": True, "precision": "int8"},
    "portable int4": {"portable": True, "precision": "int4"},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_row_gives_what_it_gives_alone(tmp_path: Path, plan: str) -> None:
    ours = OnnxSession(make_onnx(make_model(tmp_path / "model"), **PLANS[plan]), threads=1)
    prompts = [ids_of(size, size) for size in (3, 17, 8, 1)]
    fed = np.array([ids_of(6, 100 + row) for row in range(4)])
    together = [ours.start(prompts), *(ours.feed(fed[:, place : place + 1])[:, 0] for place in range(6))]
    for row, prompt in enumerate(prompts):
        alone = [ours.start([prompt]), *(ours.feed(fed[row : row + 1, place : place + 1])[:, 0] for place in range(6))]
        for many, one in zip(together, alone, strict=True):
            # Sums of float32 are taken in another order where there are several rows.
            assert np.abs(many[row] - one[0]).max() < 1e-5


@pytest.mark.parametrize("plan", PLANS)
def test_a_long_prompt_in_pieces_gives_what_it_gives_whole(
    tmp_path: Path, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = OnnxSession(make_onnx(make_model(tmp_path / "model"), **PLANS[plan]), threads=1)
    whole = ours.start([ids_of(50)])
    monkeypatch.setattr("llmcli.runtime.onnx_session._CHUNK", 16)
    pieces = ours.start([ids_of(50)])
    # Where attention's sums are taken in another order, a state may be rounded to another code.
    assert np.abs(pieces - whole).max() < (0.1 if plan == "int8" else 2e-3 if plan == "fp16" else 1e-5)
    assert ours.feed(np.array([ids_of(30, 1)]), 20).shape == (1, 20, 97)


@pytest.mark.parametrize(("before", "inside"), [(None, "1"), ("0", "0")])
def test_attention_is_computed_whole_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, inside: str | None
) -> None:
    import onnxruntime

    seen: list[str | None] = []
    name = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    opened = onnxruntime.InferenceSession

    def noted(*given: Any) -> Any:
        seen.append(os.environ.get(name))
        return opened(*given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    folder = make_onnx(make_model(tmp_path / "model"))
    OnnxSession(folder, threads=1)
    assert seen == [inside]
    assert os.environ.get(name) == before
    (folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(DataError):
        OnnxSession(folder, threads=1)
    assert os.environ.get(name) == before


def test_chunks_shrink_where_a_row_is_long_and_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OnnxSession(make_onnx(make_model(tmp_path / "model")), threads=1)
    whole = ours.start([ids_of(50)])
    monkeypatch.setattr("llmcli.runtime.onnx_session._SCORES", 1)
    runs: list[int] = []
    run = Rows._run

    def noted(rows: Rows, engine: Any, first: int, ids: Any, keep: int) -> Any:
        runs.append(ids.shape[1])
        return run(rows, engine, first, ids, keep)

    monkeypatch.setattr(Rows, "_run", noted)
    assert np.abs(ours.start([ids_of(50)]) - whole).max() < 1e-5
    assert runs == [16, 16, 16, 2]


# ----------------------------------------------------------------------------------------------------------------
# What is not ours


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.onnx.data").unlink(),
        lambda folder: (folder / "model.onnx.data").write_bytes(b"short"),
        lambda folder: (folder / "model.onnx").write_bytes(b"no graph"),
        lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-100]),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Any) -> None:
    folder = make_onnx(make_model(tmp_path / "model", hidden_size=128))
    damage(folder)
    with pytest.raises(DataError) as caught:
        OnnxSession(folder)
    assert str(folder / "model.onnx") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("Neg", r"lacks input_ids.*expected are input_ids, attention_mask, past_key_values"),
        ("Loop", r"the operator Loop is none of those that `llmcli export` writes"),
    ],
)
def test_a_graph_of_another_maker_is_told_what_is_expected(tmp_path: Path, operator: str, message: str) -> None:
    import onnx_ir as ir

    x = ir.val("x", ir.DataType.FLOAT, ["n"])
    y = ir.val("y", ir.DataType.FLOAT, ["n"])
    graph = ir.Graph([x], [y], nodes=[ir.node(operator, [x], outputs=[y])], opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(DataError, match=message):
        OnnxSession(tmp_path)


def test_running_a_folder_never_imports_torch(tmp_path: Path) -> None:
    from small_model import make_model as make_small
    from small_tokenizer import make_tokenizer

    model = make_small(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    ended: Any = completed("export", model, "-o", tmp_path / "onnx", "--precision", "fp32", "--no-check")
    assert ended.returncode == 0, ended.stderr
    script = (
        "import sys\n"
        "from llmcli.cli.main import main\n"
        "main(['generate', '-m', sys.argv[1], 'The', '--max-new-tokens', '5', '--temp', '0'], standalone_mode=False)\n"
        "main(['complete', '-m', sys.argv[1], 'The'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'onnxruntime' in sys.modules\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "onnx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------
# Portable graphs


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2"])
def test_a_portable_graph_has_standard_operators_and_takes_rows_filled_up_on_the_left(
    tmp_path: Path, family: str, precision: str
) -> None:
    import onnx
    import onnxruntime

    folder = make_onnx(make_model(tmp_path / "model", family), portable=True, precision=precision)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert {(item.domain, item.version) for item in model.opset_import} == {("", 23)}
    session = OnnxSession(folder, threads=1)
    engine = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    prompts = [ids_of(12), ids_of(5, 1), ids_of(1, 2)]
    ids, mask = np.zeros((3, 12), np.int64), np.zeros((3, 12), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 12 - len(prompt) :] = prompt
        mask[row, 12 - len(prompt) :] = 1
    shapes = {item.name: item.shape for item in engine.get_inputs() if item.name.startswith("past")}
    past = {name: np.zeros((3, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    alone = session.start(prompts)
    logits, *present = engine.run(None, {"input_ids": ids, "attention_mask": mask, **past})
    assert np.abs(logits[:, -1] - alone).max() < 1e-4
    fed = np.array([[3], [4], [5]])
    mask = np.concatenate((mask, np.ones((3, 1), np.int64)), 1)
    given = {"input_ids": fed, "attention_mask": mask, **dict(zip(past, present, strict=True))}
    assert np.abs(engine.run(["logits"], given)[0][:, -1] - session.feed(fed)[:, -1]).max() < 1e-4


def test_a_run_that_is_interrupted_leaves_the_rows_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcli.runtime import onnx_session

    theirs, ours = both(tmp_path)
    for session in (theirs, ours):
        session.start([ids_of(9), ids_of(5, 1)])
    run = onnx_session._Binding.run

    calls = 0

    def stopped(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or len(self.ids) == 2:  # the second row, or both
            raise KeyboardInterrupt
        return run(self)

    for fed in (np.array([[1], [2]]), np.array([ids_of(20), ids_of(20, 1)])):
        calls = 0
        monkeypatch.setattr(onnx_session._Binding, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            ours.feed(fed)
        monkeypatch.setattr(onnx_session._Binding, "run", run)
        assert ours.lengths == [9, 5]
    for fed in (np.array([[3], [4]]), np.array([[5, 6], [7, 8]]), np.array([[9], [10]])):
        assert np.abs(ours.feed(fed) - theirs.feed(fed)).max() < 1e-3


def test_older_folders_whose_rows_share_a_scale_run_row_by_row(tmp_path: Path) -> None:
    """llmcli wrote decoders so until it had a scale for each row."""
    folder = make_onnx(make_model(tmp_path / "model"), precision="int8", activations="tensor", few=0)
    ours = OnnxSession(folder, threads=1)
    assert ours.run_error is None
    prompts, fed = [ids_of(9), ids_of(5, 1), ids_of(12, 2)], np.array([[3], [50], [96]])
    ours.start(prompts)
    together = ours.feed(fed)[:, 0]
    for row, prompt in enumerate(prompts):
        ours.start([prompt])
        assert np.array_equal(ours.feed(fed[row : row + 1])[0, 0], together[row])


def test_a_prompt_in_int8_has_a_scale_for_each_of_its_tokens(tmp_path: Path) -> None:
    """One for all would be that of the token whose state is all in one place, and leave few steps to the others."""
    source = make_model(tmp_path / "model")
    model = load_model(source)
    with torch.no_grad():
        model.embedding[96] = 0
        model.embedding[96, 0] = 1
        model.layers[0].mlp.gate_proj.weight[:, 0] *= 10
    save_model(model, source, special_ids={"eos_token_id": 0})
    ids, wanted = np.array([[*ids_of(12), 96, *ids_of(12, 1)]]), np.ones((1, 24), np.bool_)
    exact = OnnxSession(make_onnx(source), threads=1).score(ids, wanted)
    errors = {}
    for activations in ("row", "tensor"):
        ours = OnnxSession(make_onnx(source, precision="int8", activations=activations, few=0), threads=1)
        errors[activations] = np.abs(ours.score(ids, wanted) - exact)[0, :12].mean()
    assert errors["row"] < 0.7 * errors["tensor"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-llama3"])
def test_rows_of_zeros_stay_zeros_in_int8(tmp_path: Path, family: str) -> None:
    """Nothing is divided by their scale of 0: a norm without bias makes zeros of zeros, and so on to the head."""
    source = make_model(tmp_path / "model", family)
    model = load_model(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "bias")):
                parameter.zero_()
    save_model(model, source, special_ids={"eos_token_id": 0})
    ours = OnnxSession(make_onnx(source, precision="int8", few=0), threads=1)
    assert np.array_equal(ours.start([ids_of(5)]), np.zeros((1, 97), np.float32))
