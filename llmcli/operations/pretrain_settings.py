"""A pretraining run's settings, as they are settled before its first step: shape, machine, length, plan.

Invariant: what was left open is decided from the other settings and the corpus' size alone, never from time or chance.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from llmcli import config as configs
from llmcli.config import PretrainConfig
from llmcli.errors import ConfigError
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.presets import DEFAULT, PRESETS
from llmcli.training.machine import Machine, choose_device, choose_precision, choose_threads, compiler_found
from llmcli.training.optimizer import is_matrix
from llmcli.training.plan import Plan, compile_pays, make_plan

_TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al., arXiv:2203.15556) ...
_EPOCHS = 10.0  # ... where there is text enough; repeating it more often gives little
_VALIDATIONS = 20  # in a run ...
_VALIDATED = 0.3  # ... that is long enough: tokens looked at for each token trained on, at most (a tenth of the time)
_EVAL_TOKENS = 65_536


@dataclasses.dataclass(frozen=True)
class Settled:
    """A run's settings with none left open, and what follows from them."""

    config: PretrainConfig
    shape: DecoderConfig
    machine: Machine
    plan: Plan


def vocabulary_of(config: PretrainConfig) -> int:
    """Tokens of a tokenizer that is trained for the run."""
    return config.vocab_size or PRESETS[config.preset or DEFAULT].vocab_size


def _shape(config: PretrainConfig, vocabulary: int) -> DecoderConfig:
    """The model's shape: the preset's, each part overruled by what is given."""
    if config.preset is not None and config.preset not in PRESETS:
        hint = configs.nearest(config.preset, PRESETS)
        raise ConfigError(f"no preset {config.preset!r}; there are {', '.join(PRESETS)}{hint}", where="preset")
    preset = PRESETS[config.preset or DEFAULT]
    size = config.hidden_size or preset.hidden_size
    heads = config.heads or (preset.heads if size == preset.hidden_size else max(1, size // 64))
    default_kv = preset.kv_heads if config.heads is None and heads == preset.heads else heads
    if size % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {size}", where="heads")
    gpt2 = config.family == "gpt2"
    if gpt2 and config.kv_heads not in (None, heads):
        raise ConfigError(f"gpt2 has a key/value head for each of its {heads} heads", where="kv_heads")
    default_ffn = preset.ffn_size if size == preset.hidden_size else -(-size * 8 // 3 // 32) * 32
    return DecoderConfig(
        model_type=config.family,
        vocab_size=vocabulary,
        hidden_size=size,
        num_hidden_layers=config.layers or preset.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if gpt2 else config.kv_heads or default_kv,
        head_dim=size // heads,
        intermediate_size=config.ffn_size or (4 * size if gpt2 else default_ffn),
        max_position_embeddings=config.context or preset.context,
        norm_eps=1e-5 if gpt2 else 1e-6,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=gpt2 or config.family == "qwen2",
        mlp_bias=gpt2,
    )


def settle(config: PretrainConfig, vocabulary: int, tokens: int) -> Settled:
    """Every setting that was left open, decided from the others alone."""
    shape = _shape(config, vocabulary)
    with torch.device("meta"):
        sizes = dict(Decoder(shape).named_parameters())
    parameters = sum(p.numel() for p in sizes.values())
    muon = config.optimizer == "muon"
    matrices = sum(p.numel() for name, p in sizes.items() if muon and is_matrix(name, p))
    rows = config.batch_size or PRESETS[config.preset or DEFAULT].batch_size
    if rows % config.grad_accumulation:
        raise ConfigError(f"{rows} rows cannot be worked off in {config.grad_accumulation} pieces", where="batch_size")
    per_step = rows * shape.max_position_embeddings
    steps = _steps(config, parameters, tokens, per_step)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, shape.hidden_size)
    plan = make_plan(
        shape,
        parameters=parameters,
        matrix_parameters=matrices,
        rows=rows,
        grad_accumulation=config.grad_accumulation,
        steps=steps,
        seconds=config.max_seconds,
        corpus_tokens=tokens,
        device=device,
        precision=precision,
    )
    compiles = config.compile == "on" or (config.compile == "auto" and compiler_found(device) and compile_pays(plan))
    machine = Machine(device, precision, compiles, choose_threads(config.threads))
    rate = config.learning_rate or (0.02 if muon else 0.002)
    every = config.eval_every or _eval_every(steps, per_step, config.eval_tokens or _EVAL_TOKENS)
    resolved = dataclasses.replace(
        config,
        batch_size=rows,
        layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        ffn_size=shape.intermediate_size,
        context=shape.max_position_embeddings,
        vocab_size=config.vocab_size or vocabulary,  # what was asked for: the text may not have had so many
        learning_rate=rate,
        embedding_learning_rate=config.embedding_learning_rate or (0.008 if muon else rate),
        warmup_steps=max(10, min(500, (steps or 1000) // 50)) if config.warmup_steps is None else config.warmup_steps,
        eval_every=every,
        eval_tokens=config.eval_tokens or _EVAL_TOKENS,
        save_every=config.save_every or every,
        device=device,
        threads=machine.threads,
        precision=precision,
        compile="on" if compiles else "off",
    )
    return Settled(resolved, shape, machine, plan)


def _eval_every(steps: int | None, per_step: int, eval_tokens: int) -> int:
    """Steps between validations: 20 in a run, fewer in a short one, where they would take most of the time."""
    steps = steps or 2000
    count = max(4, min(_VALIDATIONS, int(_VALIDATED * steps * per_step / eval_tokens)))
    return max(1, min(1000, steps // count))


def _steps(config: PretrainConfig, parameters: int, tokens: int, per_step: int) -> int | None:
    """Steps of the run: the least of what is asked for; None where only seconds bound it."""
    bounds = []
    if config.max_steps is not None:
        bounds.append(config.max_steps)
    if config.max_tokens is not None:
        bounds.append(math.ceil(config.max_tokens / per_step))
    if config.epochs is not None:
        bounds.append(math.ceil(config.epochs * tokens / per_step))
    if not bounds and config.max_seconds is None:
        bounds.append(math.ceil(min(_TOKENS_PER_PARAMETER * parameters, _EPOCHS * tokens) / per_step))
    return max(1, min(bounds)) if bounds else None
