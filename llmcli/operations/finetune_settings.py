"""A fine-tuning run's settings, as they are settled before its first step: machine, length, rates, plan.

Invariant: what was left open is decided from the other settings and the data's size alone, never from time or chance.
"""

from __future__ import annotations

import dataclasses
import math

from llmcli.config_finetune import FinetuneConfig, LoraConfig
from llmcli.errors import ConfigError
from llmcli.models.text_model import Shape
from llmcli.training.machine import Machine, choose_device, choose_precision, choose_threads
from llmcli.training.plan import Plan, make_plan

_EPOCHS = 3.0
_VALIDATIONS = 20


def choose_machine(config: FinetuneConfig, shape: Shape) -> Machine:
    """Where it is trained, and in which precision."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, shape.hidden_size)
    return Machine(device, precision, False, choose_threads(config.threads))  # lengths change: nothing to compile


def settle(
    config: FinetuneConfig, lora: LoraConfig, machine: Machine, examples: int, *, rate_share: float = 1.0
) -> FinetuneConfig:
    """Every setting that was left open. `examples`: those that are trained on; `rate_share`: of the default rates."""
    if config.batch_size % config.grad_accumulation:
        raise ConfigError(
            f"{config.batch_size} examples cannot be worked off in {config.grad_accumulation} pieces",
            where="batch_size",
        )
    steps = steps_of(config, examples)
    epoch = max(1, examples // config.batch_size)
    every = config.eval_every or min(max(1, epoch // 2, (steps or 0) // _VALIDATIONS), steps or epoch)
    muon = config.optimizer == "muon"
    rate = config.learning_rate or rate_share * (2e-3 if muon else 5e-4 if lora.lora else 1e-4)
    return dataclasses.replace(
        config,
        epochs=config.epochs or (None if config.max_steps or config.max_seconds else _EPOCHS),
        learning_rate=rate,
        embedding_learning_rate=config.embedding_learning_rate or (rate_share * 1e-4 if muon else rate),
        warmup_steps=min(100, (steps or 200) // 20) if config.warmup_steps is None else config.warmup_steps,
        eval_every=every,
        save_every=config.save_every or every,
        device=machine.device,
        threads=machine.threads,
        precision=machine.precision,
    )


def steps_of(config: FinetuneConfig, examples: int) -> int | None:
    """Steps of the run: the least of what is asked for; None where only seconds bound it."""
    epochs = config.epochs or (None if config.max_steps or config.max_seconds else _EPOCHS)
    bounds = [] if config.max_steps is None else [config.max_steps]
    if epochs is not None:
        bounds.append(math.ceil(epochs * examples / config.batch_size))
    return max(1, min(bounds)) if bounds else None


def plan_of(
    config: FinetuneConfig,
    shape: Shape,
    *,
    parameters: int,
    trained: int,
    matrices: int,
    examples: int,
    length: int,
) -> Plan:
    """What the run will need."""
    return make_plan(
        shape,
        parameters=parameters,
        matrix_parameters=matrices,
        rows=config.batch_size,
        grad_accumulation=config.grad_accumulation,
        steps=steps_of(config, examples),
        seconds=config.max_seconds,
        corpus_tokens=examples * length,
        device=config.device,
        precision=config.precision,
        length=length,
        trained=trained,
    )
