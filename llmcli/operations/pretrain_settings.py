"""A pretraining run's settings, as they are settled before its first step: shape, machine, length, plan.

Invariant: what was left open is decided from the other settings and the corpus' size alone, never from time or chance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from llmcli import config as configs
from llmcli.config import ObjectiveConfig, PretrainConfig
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import ConfigError
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.encoder_config import ENCODERS, EncoderConfig
from llmcli.models.encoder_heads import build_encoder
from llmcli.models.presets import DEFAULT, ENCODER_PRESETS, PRESETS, Preset
from llmcli.training.machine import Machine, choose_device, choose_precision, choose_threads, compiler_found
from llmcli.training.optimizer import is_matrix
from llmcli.training.plan import Plan, compile_pays, make_plan

_TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al., arXiv:2203.15556) ...
_EPOCHS = 10.0  # ... where there is text enough; repeating it more often gives little
_VALIDATIONS = 20  # in a run ...
_VALIDATED = 0.3  # ... that is long enough: tokens looked at for each token trained on, at most (a tenth of the time)
_EVAL_TOKENS = 65_536
_FAMILY, _ENCODER_FAMILY = "qwen3", "bert"
_DROPOUT = {"masked": 0.0, "contrastive": 0.1}  # text that is seen a few times only needs none (arXiv:2212.14034)
_CONTRASTED = 256  # texts of a step
_CONTRASTED_EPOCHS = 1.0
_FIRST_PAD = 255  # the greatest id of padding for which roberta's unused positions do not matter
# Peaks: of the blocks and of the rest with Muon, of all with AdamW. Where norms stand behind the blocks, lower ones.
_RATES = {"causal": (0.02, 0.008, 0.002), "masked": (0.004, 0.004, 0.001), "contrastive": (0.002, 1e-4, 1e-4)}

Shape = DecoderConfig | EncoderConfig


@dataclasses.dataclass(frozen=True)
class Settled:
    """A run's settings with none left open, and what follows from them."""

    config: PretrainConfig
    objective: ObjectiveConfig
    shape: Shape
    machine: Machine
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Amount:
    """What there is to train on."""

    tokens: int
    length: int | None = None  # tokens of a row in the mean; None: rows are as long as the context


def vocabulary_of(config: PretrainConfig, objective: ObjectiveConfig = ObjectiveConfig()) -> int:  # noqa: B008
    """Tokens of a tokenizer that is trained for the run."""
    return config.vocab_size or _preset(config, objective, None).vocab_size


def check_objective(config: PretrainConfig, objective: ObjectiveConfig) -> None:
    """Raises ConfigError for settings that contradict each other."""
    encoder = objective.objective != "causal"
    if config.family is not None and (config.family in ENCODERS) != encoder:
        wanted = ", ".join(ENCODERS) if encoder else "qwen3, llama, qwen2, mistral, gpt2"
        raise ConfigError(f"{config.family} is no family for {objective.objective}; take {wanted}", where="family")
    if objective.mask_token_share + objective.mask_random_share > 1:
        raise ConfigError("and mask_random_share are more than 1 together", where="mask_token_share")
    if objective.objective == "contrastive" and objective.init is None:
        raise ConfigError("contrastive begins from a model: name it", where="init")
    if objective.views == "next" and not objective.cut_sentences:
        raise ConfigError("next needs sentences: leave --no-cut-sentences out", where="views")
    if objective.objective == "contrastive" and config.compile == "on":
        raise ConfigError("there is nothing to compile for contrastive, whose texts are of any length", where="compile")
    if config.lowercase and kind_of(config, objective) != "wordpiece":
        raise ConfigError("is for --kind wordpiece; the other kinds keep every text as it is", where="lowercase")


def kind_of(config: PretrainConfig, objective: ObjectiveConfig) -> str:
    """The kind of tokenizer that is trained where none is given."""
    return config.kind or ("bpe" if objective.objective == "causal" else "wordpiece")


def _preset(config: PretrainConfig, objective: ObjectiveConfig, base: Shape | None) -> Preset:
    """The preset that is named; else the shape of the model that the run begins from; else the usual one."""
    presets = PRESETS if objective.objective == "causal" else ENCODER_PRESETS
    if config.preset is not None and config.preset not in presets:
        hint = configs.nearest(config.preset, presets)
        raise ConfigError(f"no preset {config.preset!r}; there are {', '.join(presets)}{hint}", where="preset")
    if config.preset is None and base is not None:
        return Preset(
            base.num_hidden_layers,
            base.hidden_size,
            base.num_attention_heads,
            base.num_key_value_heads if isinstance(base, DecoderConfig) else base.num_attention_heads,
            base.intermediate_size,
            base.max_position_embeddings if isinstance(base, DecoderConfig) else base.longest,
            presets[DEFAULT].batch_size,
            base.vocab_size,
        )
    return presets[config.preset or DEFAULT]


def _shape(config: PretrainConfig, preset: Preset, vocabulary: int, like: DecoderConfig | None) -> DecoderConfig:
    """The decoder's shape: the preset's, each part overruled by what is given. `like`: has the rest, where there is."""
    size, heads = _width(config, preset)
    family = like.model_type if like is not None else config.family or _FAMILY
    default_kv = preset.kv_heads if config.heads is None and heads == preset.heads else heads
    gpt2 = family == "gpt2"
    if gpt2 and config.kv_heads not in (None, heads):
        raise ConfigError(f"gpt2 has a key/value head for each of its {heads} heads", where="kv_heads")
    default_ffn = preset.ffn_size if size == preset.hidden_size else -(-size * 8 // 3 // 32) * 32
    wide = like is not None and size == like.hidden_size and heads == like.num_attention_heads
    asked: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": size,
        "num_hidden_layers": config.layers or preset.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if gpt2 else config.kv_heads or default_kv,
        "head_dim": like.head_dim if like is not None and wide else size // heads,
        "intermediate_size": config.ffn_size
        or (preset.ffn_size if like is not None else 4 * size if gpt2 else default_ffn),
        "max_position_embeddings": config.context or preset.context,
    }
    if like is not None:
        return dataclasses.replace(like, **asked)
    return DecoderConfig(
        model_type=family,
        **asked,
        norm_eps=1e-5 if gpt2 else 1e-6,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=gpt2 or family == "qwen2",
        mlp_bias=gpt2,
    )


def _encoder_shape(
    config: PretrainConfig,
    objective: ObjectiveConfig,
    preset: Preset,
    tokenizer: TextTokenizer | None,
    vocabulary: int,
    like: EncoderConfig | None,
) -> EncoderConfig:
    """The encoder's shape, likewise."""
    size, heads = _width(config, preset)
    family = like.model_type if like is not None else config.family or _ENCODER_FAMILY
    if config.kv_heads not in (None, heads):
        raise ConfigError(f"an encoder has a key/value head for each of its {heads} heads", where="kv_heads")
    pad = tokenizer.pad_id or 0 if tokenizer is not None else 0
    if family == "roberta" and pad > _FIRST_PAD:
        raise ConfigError(
            f"roberta counts positions from behind its padding, which is token {pad:,} here; take bert, or --kind bpe",
            where="family",
        )
    rate = _DROPOUT[objective.objective] if objective.dropout is None else objective.dropout
    context = config.context or preset.context
    asked: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": size,
        "num_hidden_layers": config.layers or preset.layers,
        "num_attention_heads": heads,
        "intermediate_size": config.ffn_size or (preset.ffn_size if size == preset.hidden_size else 4 * size),
        "max_position_embeddings": context + (pad + 1 if family == "roberta" else 0),
        "pad_token_id": pad,
        "hidden_dropout": rate,
        "attention_dropout": rate,
    }
    if like is not None:
        return dataclasses.replace(like, **asked)
    return EncoderConfig(
        model_type=family,
        **asked,
        type_vocab_size={"bert": 2, "roberta": 1, "distilbert": 0}[family],
        norm_eps=1e-5 if family == "roberta" else 1e-12,
    )


def _width(config: PretrainConfig, preset: Preset) -> tuple[int, int]:
    """The width of the hidden states and the heads that divide it."""
    size = config.hidden_size or preset.hidden_size
    heads = config.heads or (preset.heads if size == preset.hidden_size else max(1, size // 64))
    if size % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {size}", where="heads")
    return size, heads


def settle(
    config: PretrainConfig,
    vocabulary: int,
    amount: int | Amount,
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008  (frozen)
    *,
    base: Shape | None = None,
    tokenizer: TextTokenizer | None = None,
) -> Settled:
    """Every setting that was left open, decided from the others alone.

    `amount`: what there is to train on (a number: tokens of a corpus). `base`: the shape of the model that the run
    begins from. `tokenizer`: an encoder's.
    """
    amount = Amount(amount) if isinstance(amount, int) else amount
    check_objective(config, objective)
    preset, contrastive = _preset(config, objective, base), objective.objective == "contrastive"
    same = config.preset is None and base is not None and config.family in (None, base.model_type)
    shape: Shape
    if objective.objective == "causal":
        shape = _shape(config, preset, vocabulary, base if same and isinstance(base, DecoderConfig) else None)
        context, head_share = shape.max_position_embeddings, 1.0
    else:
        like = base if same and isinstance(base, EncoderConfig) else None
        shape = _encoder_shape(config, objective, preset, tokenizer, vocabulary, like)
        context, head_share = shape.longest, 0.0 if contrastive else objective.mask_fraction
    sizes = _sizes(shape, objective)
    parameters = sum(p.numel() for p in sizes.values())
    muon = config.optimizer == "muon"
    matrices = sum(p.numel() for name, p in sizes.items() if muon and is_matrix(name, p))
    rows = config.batch_size or (_CONTRASTED if contrastive else preset.batch_size)
    if rows % config.grad_accumulation:
        raise ConfigError(f"{rows} rows cannot be worked off in {config.grad_accumulation} pieces", where="batch_size")
    length = amount.length or context
    per_step = rows * length
    steps = _steps(config, objective, parameters, amount.tokens, per_step)
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
        corpus_tokens=amount.tokens,
        device=device,
        precision=precision,
        length=2 * length if contrastive else length,  # two views of each text
        head_share=head_share,
    )
    pays = compiler_found(device) and compile_pays(plan) and not contrastive  # whose lengths change
    compiles = config.compile == "on" or (config.compile == "auto" and pays)
    machine = Machine(device, precision, compiles, choose_threads(config.threads))
    rate = config.learning_rate or _RATES[objective.objective][0 if muon else 2]
    rest_rate = config.embedding_learning_rate or (_RATES[objective.objective][1] if muon else rate)
    every = config.eval_every or _eval_every(steps, per_step, config.eval_tokens or _EVAL_TOKENS)
    resolved = dataclasses.replace(
        config,
        kind=kind_of(config, objective),
        family=shape.model_type,
        batch_size=rows,
        layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads if isinstance(shape, DecoderConfig) else shape.num_attention_heads,
        ffn_size=shape.intermediate_size,
        context=context,
        vocab_size=config.vocab_size or vocabulary,  # what was asked for: the text may not have had so many
        learning_rate=rate,
        embedding_learning_rate=rest_rate,
        warmup_steps=max(10, min(500, (steps or 1000) // 50)) if config.warmup_steps is None else config.warmup_steps,
        eval_every=every,
        eval_tokens=config.eval_tokens or _EVAL_TOKENS,
        save_every=config.save_every or every,
        device=device,
        threads=machine.threads,
        precision=precision,
        compile="on" if compiles else "off",
    )
    dropout = objective.dropout if isinstance(shape, DecoderConfig) else shape.hidden_dropout
    return Settled(resolved, dataclasses.replace(objective, dropout=dropout), shape, machine, plan)


def _sizes(shape: Shape, objective: ObjectiveConfig) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model of this shape, without memory for them."""
    with torch.device("meta"):
        if isinstance(shape, DecoderConfig):
            return dict(Decoder(shape).named_parameters())
        return dict(build_encoder(shape, "masked" if objective.objective == "masked" else "base").named_parameters())


def _eval_every(steps: int | None, per_step: int, eval_tokens: int) -> int:
    """Steps between validations: 20 in a run, fewer in a short one, where they would take most of the time."""
    steps = steps or 2000
    count = max(4, min(_VALIDATIONS, int(_VALIDATED * steps * per_step / eval_tokens)))
    return max(1, min(1000, steps // count))


def _steps(
    config: PretrainConfig, objective: ObjectiveConfig, parameters: int, tokens: int, per_step: int
) -> int | None:
    """Steps of the run: the least of what is asked for; None where only seconds bound it."""
    bounds = []
    if config.max_steps is not None:
        bounds.append(config.max_steps)
    if config.max_tokens is not None:
        bounds.append(math.ceil(config.max_tokens / per_step))
    if config.epochs is not None:
        bounds.append(math.ceil(config.epochs * tokens / per_step))
    if not bounds and config.max_seconds is None and objective.objective == "contrastive":
        bounds.append(math.ceil(_CONTRASTED_EPOCHS * tokens / per_step))
    elif not bounds and config.max_seconds is None:
        bounds.append(math.ceil(min(_TOKENS_PER_PARAMETER * parameters, _EPOCHS * tokens) / per_step))
    return max(1, min(bounds)) if bounds else None
