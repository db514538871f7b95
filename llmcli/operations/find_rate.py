"""`finetune --find-lr`: the loss while the learning rate rises, and the rate at which it falls fastest.

Invariant: the weights that are trained are thrown away; nothing is written but the picture.

Source: the learning-rate range test (arXiv:1506.01186), section 3.3. The rule: the rate rises by the same factor at
each step; losses are averaged over the steps around each; suggested is the rate, below that of the least loss, at
which the average falls fastest for a factor of the rate.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmcli import settings as configs
from llmcli.config_finetune import FinetuneConfig, LabelledConfig, LoraConfig
from llmcli.errors import LlmcliError, MissingExtraError
from llmcli.files.artefacts import resolve_model
from llmcli.operations.finetune import PreparedRun, loop_of, prepared_run
from llmcli.operations.plot import draw_rates
from llmcli.operations.records import Progress
from llmcli.operations.run_folder import RATES_IMAGE
from llmcli.operations.tasks import Referring
from llmcli.operations.training_run import Started
from llmcli.training.loop import NotFiniteError, TrainingEvent, TrainingState
from llmcli.training.optimizer import Optimizer
from llmcli.training.schedule import Budget

LOWEST, HIGHEST = 1e-7, 1.0
_WORSE = 2.0  # times what it began with: it will not come back


@dataclasses.dataclass(frozen=True, slots=True)
class FoundRate:
    """The last record. The lists have a value for each step that was made."""

    suggested: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    image: str | None


def find_rate(
    task: str,
    model: str | Path,
    data: str | Path | Sequence[str],
    run: str | Path,
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008  (frozen)
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    labelled: LabelledConfig = LabelledConfig(),  # noqa: B008
    own: Any = None,
    *,
    steps: int = 100,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Progress | Started | TrainingEvent | FoundRate]:
    """Trains on throw-away weights with a rate that rises; the picture goes to RUN/find-lr.svg.

    The other rate, of embedding and norms, keeps its proportion. Raises LlmcliError where the loss falls at no rate.
    """
    inputs = [str(data)] if isinstance(data, str | Path) else [str(item) for item in data]
    settings = [each for each in (config, lora, labelled, own) if each is not None]
    for each in settings:
        configs.check(each)
    prepared: PreparedRun | None = None
    for record in prepared_run(task, resolve_model(model, onnx=False), inputs, settings):
        if isinstance(record, PreparedRun):
            prepared = record
        else:
            yield record
    assert prepared is not None
    if isinstance(prepared.task, Referring):
        with tempfile.TemporaryDirectory() as scratch:
            rows = [*prepared.data.train, *prepared.data.validation]
            yield from prepared.task.refer(prepared.model, rows, Path(scratch), "")
    yield prepared.started(str(run), None, ())
    rates: list[float] = []
    losses: list[float] = []
    try:
        for event in _rising(prepared, steps, stopping):
            yield event
            if event.event == "step" and event.loss is not None:
                rates.append(event.learning_rate or 0.0)
                losses.append(event.loss)
            if event.reason == "stopped":
                return
            if len(losses) > 10 and np.mean(losses[-5:]) > _WORSE * np.mean(losses[:5]):
                break
    except NotFiniteError:
        pass  # that far and no further
    smoothed, place = steepest(rates, losses, steps)
    image: Path | None = Path(run) / RATES_IMAGE
    try:
        assert image is not None
        draw_rates(rates, losses, smoothed, rates[place], image)
    except MissingExtraError:
        image = None
    yield FoundRate(rates[place], rates, losses, smoothed, None if image is None else str(image))


def _rising(prepared: PreparedRun, steps: int, stopping: Callable[[], bool]) -> Iterator[TrainingEvent]:
    config = prepared.config
    optimizer = Optimizer(
        prepared.model, kind=config.optimizer, weight_decay=config.weight_decay, dtype=prepared.machine.dtype
    )
    loop = loop_of(prepared, optimizer, steps, TrainingState(), stopping)
    proportion = (config.embedding_learning_rate or 1.0) / (config.learning_rate or 1.0)
    factor = (HIGHEST / LOWEST) ** (1 / max(steps - 1, 1))
    loop.settings = dataclasses.replace(
        loop.settings,
        budget=Budget(steps, None),
        matrix_rate=1.0,
        rest_rate=proportion,
        rate=lambda step: LOWEST * factor**step,
        eval_every=steps + 1,
        save_every=steps + 1,
    )
    loop.validate = lambda: None
    for event in loop.run():
        if event.event != "checkpoint":
            yield event


def steepest(rates: Sequence[float], losses: Sequence[float], steps: int) -> tuple[list[float], int]:
    """The losses, each averaged with those around it, and the place of the rate to suggest.

    `steps`: of the whole test, a twentieth of which is averaged on each side. Raises LlmcliError where nothing falls.
    """
    reach = max(1, steps // 20)
    smoothed = [float(np.mean(losses[max(0, at - reach) : at + reach + 1])) for at in range(len(losses))]
    least = int(np.argmin(smoothed)) if smoothed else 0
    if least < 2:
        raise LlmcliError("the loss fell at no rate, so none can be suggested; look at the data, or take more steps")
    slopes = np.gradient(smoothed[: least + 1], np.log(rates[: least + 1]))
    return smoothed, int(np.argmin(slopes))
