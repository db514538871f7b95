"""`finetune --sweep` and `--find-lr`: what they try, that a stopped sweep goes on, what they leave, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import forked
import pytest
from small_tuning import SETTINGS, make_base, pairs, reviews, sums, tiny

from llmcli.config import ClassifyTuneConfig, FinetuneConfig, LabelledConfig, LoraConfig, PreferTuneConfig, SweepConfig
from llmcli.errors import ConfigError, LlmcliError, UsageError
from llmcli.operations.find_rate import FoundRate, find_rate, steepest
from llmcli.operations.finetune import finetune
from llmcli.operations.plot import read_curves
from llmcli.operations.sweep import SweepEnd, TrialStarted, plan_sweep, sweep
from llmcli.operations.sweep_trials import change_the_loss, combinations
from llmcli.operations.verify import verify
from llmcli.training.loop import TrainingEvent

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return reviews(base.with_name("reviews.tsv"))


def swept(base: Path, data: Path, run: Path, *tried: str, method: str = "grid", **details: Any) -> list[Any]:
    config = details.pop("config", None) or tiny(max_steps=4)
    asked = SweepConfig(sweep=tried, sweep_method=method)
    task = details.pop("task", "classify")
    own = {"classify": ClassifyTuneConfig(), "prefer": PreferTuneConfig()}.get(task)
    settings = (config, LoraConfig(), LabelledConfig(), own, asked)
    return list(sweep(task, base, str(data), run, *settings, **details))


def steps_of(records: list[Any]) -> int:
    return sum(isinstance(record, TrainingEvent) and record.event == "step" for record in records)


def tensors(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------
# Sweeps


def test_a_grid_runs_every_combination_and_keeps_the_best(tmp_path: Path, base: Path, data: Path) -> None:
    run = tmp_path / "run"
    records = swept(base, data, run, "learning_rate=1e-6,0.02", "batch_size=4,8")
    end = records[-1]
    assert isinstance(end, SweepEnd)
    names = ["learning_rate=1e-06,batch_size=4", "learning_rate=0.02,batch_size=8"]
    assert {names[0], names[1]} < {path.name for path in (run / "trials").iterdir()}
    assert len(end.trials) == 4
    assert [trial.halts for trial in end.trials] == sorted(trial.halts for trial in end.trials)
    assert [trial.criterion for trial in end.trials] == [-trial.figures["accuracy"] for trial in end.trials]
    assert all(trial.state == "done" and trial.step == 4 for trial in end.trials)
    best = run / "trials" / end.trials[0].name
    assert tensors(run / "model") == tensors(best / "model")
    assert list(verify(run).problems) == []
    assert (run / "sweep.svg").read_text().count("validation") >= 4
    curves = read_curves([run])
    assert [Path(curve.run).name for curve in curves] == sorted(trial.name for trial in end.trials)
    assert all(len(curve.training) == 4 and curve.validation for curve in curves)
    alone = tmp_path / "alone"  # a trial is the run that it would be by itself
    config = tiny(max_steps=4, **end.trials[0].settings)
    list(finetune("classify", base, str(data), alone, config, LoraConfig(), LabelledConfig(), ClassifyTuneConfig()))
    assert tensors(alone / "model") == tensors(run / "model")
    again = swept(base, data, run, "learning_rate=1e-6,0.02", "batch_size=4,8", resume="auto")
    assert steps_of(again) == 0
    assert again[-1].trials == end.trials


@pytest.mark.parametrize("method", ["grid", "halving"])
def test_a_stopped_sweep_goes_on_to_the_same_end(tmp_path: Path, base: Path, data: Path, method: str) -> None:
    tried = ("learning_rate=1e-5,1e-4,0.02",)
    config = tiny(max_steps=8)
    straight = swept(base, data, tmp_path / "straight", *tried, method=method, config=config)
    seen = 0

    def stopping() -> bool:
        return seen >= 5

    asked = SweepConfig(sweep=tried, sweep_method=method)
    settings = (config, LoraConfig(), LabelledConfig(), ClassifyTuneConfig(), asked)
    for record in sweep("classify", base, str(data), tmp_path / "broken", *settings, stopping=stopping):
        seen += isinstance(record, TrainingEvent) and record.event == "step"
        last = record
    assert isinstance(last, SweepEnd)
    assert last.model is None
    on = swept(base, data, tmp_path / "broken", *tried, method=method, config=config, resume="auto")
    assert on[-1].trials == straight[-1].trials
    assert tensors(tmp_path / "broken" / "model") == tensors(tmp_path / "straight" / "model")
    assert steps_of(on) + seen == steps_of(straight)


def test_halving_stops_the_worse_early_and_the_rest_runs_to_its_end(tmp_path: Path, base: Path) -> None:
    data = sums(tmp_path / "sums.jsonl")
    rates = "learning_rate=1e-7,1e-6,0.001,0.002"
    records = swept(base, data, tmp_path / "run", rates, task="chat", method="halving", config=tiny(max_steps=8))
    end = records[-1]
    states = {trial.settings["learning_rate"]: (trial.state, trial.step) for trial in end.trials}
    assert states[1e-7] == states[1e-6] == ("stopped early", 2)
    assert sorted([states[0.001], states[0.002]]) == [("done", 8), ("stopped early", 4)]
    assert end.trials[0].state == "done"
    assert steps_of(records) == 2 + 2 + 4 + 8
    assert [record.share for record in records if isinstance(record, TrialStarted)] == [0.25] * 4 + [0.5] * 2 + [1.0]
    (whole,) = [trial for trial in end.trials if trial.state == "done"]
    alone = tmp_path / "alone"  # halting has left no trace
    config = tiny(max_steps=8, **whole.settings)
    list(finetune("chat", base, str(data), alone, config))
    assert tensors(alone / "model") == tensors(tmp_path / "run" / "model")


@pytest.mark.parametrize("method", ["grid", "halving"])
def test_settings_that_change_the_loss_are_judged_by_accuracy_alone(tmp_path: Path, base: Path, method: str) -> None:
    data = pairs(tmp_path / "pairs.jsonl")
    end = swept(base, data, tmp_path / "run", "beta=0.001,10", task="prefer", method=method)[-1]
    assert end.trials[0].state == "done"
    for trial in end.trials:
        assert trial.halts
        assert {halt[1] for halt in trial.halts} == {0.0}
        assert trial.criterion == -trial.figures["accuracy"]
    own: list[Any] = [FinetuneConfig(), LoraConfig(), LabelledConfig(), PreferTuneConfig()]
    for tried, unlike in ((("beta=0.1", "lr=1,2"), False), (("label_smoothing=0,0.1", "lr=1,2"), True)):
        assert change_the_loss(combinations(SweepConfig(sweep=tried), own)) is unlike


def test_the_plan_of_a_sweep_names_its_trials_and_writes_nothing(tmp_path: Path, base: Path, data: Path) -> None:
    asked = SweepConfig(sweep=("batch_size=4,8", "epochs=1,2"), sweep_method="halving")
    config = tiny(max_steps=None)
    settings = (config, LoraConfig(), LabelledConfig(), ClassifyTuneConfig())
    plan = plan_sweep("classify", base, str(data), *settings, asked)
    assert [(trial.settings["batch_size"], trial.steps) for trial in plan.trials] == [(4, 9), (4, 18), (8, 5), (8, 9)]
    assert plan.shares == (0.25, 0.5, 1.0)
    assert plan.first.plan.steps == 9
    with pytest.raises(ConfigError, match="held out"):
        plan_sweep("classify", base, str(data), tiny(val_split=0.0), *settings[1:], asked)
    with pytest.raises(ConfigError, match="did you mean"):
        plan_sweep("classify", base, str(data), *settings, SweepConfig(sweep=("batch_sise=2",)))


def test_a_trial_whose_loss_is_not_finite_does_not_end_the_sweep(tmp_path: Path, base: Path, data: Path) -> None:
    config = tiny(max_steps=4, max_grad_norm=0, warmup_steps=0)
    end = swept(base, data, tmp_path / "run", "learning_rate=1e30,0.01", config=config)[-1]
    assert [trial.state for trial in end.trials] == ["done", "failed"]
    with pytest.raises(LlmcliError, match="every trial"):
        swept(base, data, tmp_path / "none", "learning_rate=1e30", config=config)


@pytest.mark.parametrize(
    ("tried", "told"),
    [
        (["lerning_rate=1"], "did you mean learning_rate"),
        (["learning_rate"], "NAME=VALUE"),
        (["learning_rate=fast"], "learning_rate: must be a number, is 'fast'"),
        (["batch_size=2,0"], "batch_size: must be at least 1, is 0"),
        (["optimizer=adamw,sgd"], "optimizer: must be one of"),
        (["lora=maybe"], "lora: must be true or false"),
        (["lr=1", "learning-rate=2"], "given twice"),
        (["val_split=0.1,0.2"], "decides what is validated on"),
        (["columns=a"], "unknown setting"),
        (["batch_size=3", "grad_accumulation=2"], "cannot be worked off"),
    ],
)
def test_what_cannot_be_tried_is_refused_at_once(
    tmp_path: Path, base: Path, data: Path, tried: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        swept(base, data, tmp_path / "run", *tried)
    assert not (tmp_path / "run").exists()


def test_values_are_of_their_settings_types() -> None:
    asked = SweepConfig(sweep=("lr=1e-3", "lora=true,false", "epochs=2", "class_weights=none,balanced"))
    found = combinations(asked, [FinetuneConfig(), LoraConfig(), LabelledConfig(), ClassifyTuneConfig(), asked])
    assert [dict(each.values) for each in found] == [
        {"learning_rate": 1e-3, "lora": lora, "epochs": 2.0, "class_weights": weights}
        for lora in (True, False)
        for weights in ("none", "balanced")
    ]
    assert found[0].settings[1].lora is True
    assert found[1].settings[3].class_weights == "balanced"


def test_seeds_are_tried_where_they_do_not_draw_what_is_validated_on(tmp_path: Path, base: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="decides what is validated on"):
        swept(base, data, tmp_path / "run", "seed=0,1")
    config = tiny(max_steps=2, validation=str(reviews(tmp_path / "held_out.tsv", 20, seed=9)), allow_overlap=True)
    end = swept(base, data, tmp_path / "run", "seed=0,1", config=config)[-1]
    assert {trial.settings["seed"] for trial in end.trials} == {0, 1}
    assert end.trials[0].loss != end.trials[1].loss


def test_a_sweep_needs_something_held_out_and_keeps_to_its_grid(tmp_path: Path, base: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="held out"):
        swept(base, data, tmp_path / "run", "lr=1,2", config=tiny(val_split=0.0))
    swept(base, data, tmp_path / "run", "lr=0.01", config=tiny(max_steps=2))
    with pytest.raises(UsageError, match="sweep"):
        swept(base, data, tmp_path / "run", "lr=0.02", config=tiny(max_steps=2), resume="auto")


# ----------------------------------------------------------------------------------------------------------------
# The range test


def test_the_rate_is_where_the_average_falls_fastest() -> None:
    rates = [10 ** (-6 + place / 10) for place in range(50)]
    losses = [3 - 2 / (1 + 2.718 ** -(place - 25)) + (0.3 * (place - 40) if place > 40 else 0) for place in range(50)]
    smoothed, place = steepest(rates, losses, 50)
    assert place in (24, 25, 26)
    assert len(smoothed) == 50
    with pytest.raises(LlmcliError, match="fell at no rate"):
        steepest(rates, [float(each) for each in range(50)], 50)


@pytest.mark.parametrize("lora", [False, True])
def test_a_rate_is_found_and_nothing_but_the_picture_is_written(
    tmp_path: Path, base: Path, data: Path, lora: bool
) -> None:
    before = tensors(base)
    run = tmp_path / "run"
    settings = (tiny(), LoraConfig(lora=lora, lora_rank=2), LabelledConfig(), ClassifyTuneConfig())
    found = list(find_rate("classify", base, str(data), run, *settings, steps=40))[-1]
    assert isinstance(found, FoundRate)
    assert found.rates[0] == pytest.approx(1e-7)
    ratios = {round(b / a, 6) for a, b in zip(found.rates, found.rates[1:], strict=False)}
    assert len(ratios) == 1
    assert 1e-5 < found.suggested < 1
    assert tensors(base) == before
    assert [path.name for path in run.iterdir()] == ["find-lr.svg"]
    list(finetune("classify", base, str(data), run, tiny(max_steps=2), *settings[1:]))  # the picture is not in the way
    assert {"find-lr.svg", "model"} < {path.name for path in run.iterdir()}


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_the_table_and_the_rate(tmp_path: Path, base: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    sums(place / "sums.jsonl")
    words = [w for name, value in {**SETTINGS, "max_steps": 2}.items() for w in (f"--{name.replace('_', '-')}", value)]
    line = ["finetune", "chat", str(base), "sums.jsonl", "-o", "run", *map(str, words)]
    plan = forked.run(*line, "--sweep", "batch_size=4,8", "--dry-run", cwd=place).stdout.splitlines()
    assert plan[0] == "trials     2, one after another"
    assert [row.split() for row in plan[1:3]] == [["batch_size=4", "2", "steps"], ["batch_size=8", "2", "steps"]]
    assert any(row.startswith("memory") for row in plan)
    assert not (place / "run").exists()
    found = forked.run(*line, "--sweep", "batch_size=4,8", "--json", cwd=place)
    records = [json.loads(each) for each in found.stdout.splitlines()]
    assert records[-1]["event"] == "sweep"
    assert [each["state"] for each in records if each["event"] == "trial"] == ["done"] * 2
    assert all("trial" in each for each in records if each["event"] == "step")
    again = forked.run(*line, "--resume", cwd=place)
    rows = again.stdout.splitlines()
    assert rows[0].split() == ["trial", "validation", "at", "step", "steps"]
    assert rows[1].split()[0] == records[-1]["best"]
    assert rows[-1] == os.path.join("run", "model")
    rate = forked.run(*line[:4], "-o", "rates", "--find-lr", "--find-lr-steps", "30", "--batch-size", "8", cwd=place)
    assert 1e-7 < float(rate.stdout) < 1
    both = forked.run(*line[:4], "-o", "rates", "--find-lr", "--sweep", "lr=1,2", cwd=place, code=2)
    assert both.stderr.count("\n") == 1
