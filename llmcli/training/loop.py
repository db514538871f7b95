"""The one training loop: pretraining, fine-tuning and preference training hand it micro-batches and a loss.

Invariant: the state after step N depends on the state at the start, the settings and the batches alone; so N steps
equal N/2 steps, a kill and a resume, bit for bit on the CPU. The loop yields records; it neither prints nor saves:
what is to be saved, and where, the caller decides when it gets a record.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmcli.config import PretrainConfig
from llmcli.config_finetune import FinetuneConfig
from llmcli.errors import LlmcliError
from llmcli.training.optimizer import Optimizer
from llmcli.training.schedule import Budget, multiplier

Batch = tuple[Any, Tensor]  # inputs, as the loss takes them; targets


class Validation(NamedTuple):
    """What a validation found."""

    loss: float  # nats a target
    bits_per_byte: float | None = None
    figures: Mapping[str, float] | None = None  # a task's own: accuracy, ...
    criterion: float | None = None  # the least is the best; None: the loss is


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingEvent:
    """What happened: "step", "validation", "checkpoint" or "end"."""

    event: str
    step: int  # steps done
    tokens: int  # tokens trained on, over all steps
    loss: float | None = None  # nats per target
    bits_per_byte: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    elapsed_seconds: float = 0.0
    total_steps: int | None = None
    progress: float = 0.0  # of the budget, 0 to 1
    best: bool = False  # of a validation: the best so far
    figures: Mapping[str, float] | None = None  # of a validation: what the task measures beside the loss
    criterion: float | None = None  # of a validation: what it is judged by, the least is the best
    reason: str | None = None  # of the end: "steps", "seconds", "patience", "stopped"; in the metrics "not-finite" too


@dataclasses.dataclass
class TrainingState:
    """What is kept beside weights and optimizer: a JSON object."""

    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    best_loss: float = math.inf  # or what a task is judged by
    best_step: int = 0
    bad_validations: int = 0
    validated_step: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite best is null."""
        values = dataclasses.asdict(self)
        return values | {"best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingState:
        """The state that `to_json` wrote."""
        best = values.get("best_loss")
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        return cls(**known | {"best_loss": math.inf if best is None else best})


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How the loop goes; see PretrainConfig for what each means to a user."""

    budget: Budget
    matrix_rate: float
    rest_rate: float
    warmup_steps: int
    decay_fraction: float
    grad_accumulation: int
    max_grad_norm: float
    eval_every: int
    save_every: int
    patience: int  # validations without a better one; 0: never stops
    rate: Callable[[int], float] | None = None  # of a step, in place of warm-up and decay: what the peaks are scaled by

    @classmethod
    def of(cls, config: PretrainConfig | FinetuneConfig, steps: int | None) -> LoopSettings:
        """As a run's settings say, once what they leave open is settled."""
        return cls(
            budget=Budget(steps, config.max_seconds),
            matrix_rate=config.learning_rate or 0.0,
            rest_rate=config.embedding_learning_rate or 0.0,
            warmup_steps=config.warmup_steps or 0,
            decay_fraction=config.decay_fraction,
            grad_accumulation=config.grad_accumulation,
            max_grad_norm=config.max_grad_norm,
            eval_every=config.eval_every or 1,
            save_every=config.save_every or 1,
            patience=config.patience,
        )


@dataclasses.dataclass
class Loop:
    """A model in training. `batches(number)` yields micro-batches from that number on; `loss` gives a scaled sum."""

    model: nn.Module
    optimizer: Optimizer
    settings: LoopSettings
    state: TrainingState
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Any, Tensor, Tensor], Tensor]  # inputs, targets, scale -> sum of nats times scale
    count_targets: Callable[[Tensor], int]
    validate: Callable[[], Validation | None]  # None: nothing to validate on
    stopping: Callable[[], bool]  # whether a signal asked for the end
    count_tokens: Callable[[Any], int] | None = None  # that the inputs hold; None: as many as targets
    reduce: Callable[[nn.Module], None] = lambda _model: None  # the one place where ranks would exchange gradients

    def run(self) -> Iterator[TrainingEvent]:
        """Trains to the end of the budget. After a "checkpoint" record the caller saves before it asks for the next."""
        settings, state = self.settings, self.state
        began = time.perf_counter() - state.elapsed_seconds
        coming = self.batches(state.step * settings.grad_accumulation)
        device = next(self.model.parameters()).device
        saved = (state.step, state.validated_step)
        while True:
            progress = settings.budget.progress(state.step, state.elapsed_seconds)
            reason = self._reason(progress)
            due = state.step % settings.eval_every == 0 or reason is not None
            if due and state.step > state.validated_step and reason != "stopped":
                self._check_weights()
                record = self._validation(began)
                if record is not None:
                    yield record
                reason = self._reason(progress)  # it may have been one too many, or a signal may have cut it short
            due = state.step % settings.save_every == 0 or reason is not None
            if due and state.step and (state.step, state.validated_step) != saved:
                self._check_weights()
                saved = (state.step, state.validated_step)
                yield self._event("checkpoint")
            if reason is not None:
                yield self.ended(reason)
                return
            yield self._step(coming, device, progress, began)

    def _reason(self, progress: float) -> str | None:
        """Why it ends now; None: it goes on. The same for a run that was resumed where it had ended."""
        steps, patience = self.settings.budget.steps, self.settings.patience
        if self.stopping():
            return "stopped"
        if progress >= 1.0:
            return "steps" if steps is not None and self.state.step >= steps else "seconds"
        return "patience" if patience and self.state.bad_validations >= patience else None

    def _check_weights(self) -> None:
        """Raises NotFiniteError where a step has ruined the weights, which no loss has shown yet."""
        norms = torch._foreach_norm(
            [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
        )
        if not bool(torch.stack([norm.float() for norm in norms]).isfinite().all()):
            raise NotFiniteError("norm of the weights", self.state.step)

    def _step(self, coming: Iterator[Batch], device: torch.device, progress: float, began: float) -> TrainingEvent:
        settings, state = self.settings, self.state
        started = time.perf_counter()
        warmup, decay = settings.warmup_steps, settings.decay_fraction
        rate = (
            multiplier(state.step, progress, warmup_steps=warmup, decay_fraction=decay)
            if settings.rate is None
            else settings.rate(state.step)
        )
        parts = [next(coming) for _ in range(settings.grad_accumulation)]
        targets = sum(self.count_targets(batch[1]) for batch in parts)
        tokens = targets if self.count_tokens is None else sum(self.count_tokens(batch[0]) for batch in parts)
        scale = torch.tensor(1.0 / max(targets, 1), device=device)
        total = torch.zeros((), device=device)
        for inputs, wanted in parts:
            loss = self.loss(inputs, wanted, scale)
            torch.autograd.backward([loss])
            total += loss.detach()
        self.reduce(self.model)
        norm = self.optimizer.clip(settings.max_grad_norm)
        loss_value, norm_value = float(total), float(norm)
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            what = "loss" if not math.isfinite(loss_value) else "gradient"
            raise NotFiniteError(what, state.step + 1)
        self.optimizer.step(settings.matrix_rate * rate, settings.rest_rate * rate)
        state.step += 1
        state.tokens += tokens
        now = time.perf_counter()
        state.elapsed_seconds = now - began
        return self._event(
            "step",
            loss=loss_value,
            learning_rate=settings.matrix_rate * rate,
            gradient_norm=norm_value,
            tokens_per_second=tokens / (now - started),
        )

    def _validation(self, began: float) -> TrainingEvent | None:
        found = self.validate()
        state = self.state
        state.elapsed_seconds = time.perf_counter() - began
        if found is None:
            return None
        state.validated_step = state.step
        loss, bits, figures, criterion = found
        if not math.isfinite(loss):
            raise NotFiniteError("validation loss", state.step)
        judged = loss if criterion is None else criterion
        better = judged < state.best_loss
        if better:
            state.best_loss, state.best_step, state.bad_validations = judged, state.step, 0
        else:
            state.bad_validations += 1
        return self._event("validation", loss=loss, bits_per_byte=bits, best=better, figures=figures, criterion=judged)

    def ended(self, reason: str) -> TrainingEvent:
        """The last record: where the run stands and why it goes no further."""
        return self._event("end", reason=reason)

    def _event(self, kind: str, **details: Any) -> TrainingEvent:
        state, budget = self.state, self.settings.budget
        return TrainingEvent(
            kind,
            state.step,
            state.tokens,
            elapsed_seconds=state.elapsed_seconds,
            total_steps=budget.steps,
            progress=budget.progress(state.step, state.elapsed_seconds),
            **details,
        )


class NotFiniteError(LlmcliError):
    """A loss or a gradient is NaN or infinite: the run stops, the last checkpoint stands (exit code 1)."""

    kind = "not-finite"

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"the {what} is not finite at step {step}; a lower --learning-rate may help")
        self.step = step
