"""The plan of a run before it begins: parameters, memory, work, time.

Invariant: the plan is computed from the settings alone, so that it can decide (compile or not) the same way twice.
Formulae: 6 x parameters x tokens for the products of forward and backward (Kaplan et al., arXiv:2001.08361), 12 x
layers x width x context a token for attention, halved where half of it is masked (decoders).
"""

from __future__ import annotations

import dataclasses

from llmcli.models.config import DecoderConfig
from llmcli.models.encoder_config import EncoderConfig

# What a product of the shapes of such models reaches on a common machine, in FLOP/s; an estimate, shown as one.
_RATES = {"cpu": {"float32": 120e9, "bfloat16": 350e9}, "cuda": {"float32": 30e12, "bfloat16": 250e12}}
_COMPILE_PAYS_SECONDS = 240.0  # compiling takes 20 to 60 s and saves about a third


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a run will need. Bytes and seconds are estimates."""

    parameters: int
    embedding_parameters: int
    steps: int | None
    tokens_per_step: int
    train_tokens: int | None
    epochs: float | None
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    flops_per_step: float
    estimated_seconds: float | None
    checkpoint_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def make_plan(
    config: DecoderConfig | EncoderConfig,
    *,
    parameters: int,
    matrix_parameters: int,
    rows: int,
    grad_accumulation: int,
    steps: int | None,
    seconds: float | None,
    corpus_tokens: int,
    device: str,
    precision: str,
    length: int | None = None,
    trained: int | None = None,
    head_share: float = 1.0,
) -> Plan:
    """The plan. `rows` are those of a whole step; `matrix_parameters` those that Muon takes (one buffer, not two).

    `length`: tokens of a row (None: the context). `trained`: parameters that change (None: all); the others are held
    in the activations' precision and get no gradient, which saves a third of their products. `head_share`: of the
    tokens, those that the head is asked of.
    """
    context, size = length or config.max_position_embeddings, config.hidden_size
    trained = parameters if trained is None else trained
    tied = isinstance(config, EncoderConfig) or config.tie_word_embeddings
    embedding = config.vocab_size * size * (1 if tied else 2)
    tokens = rows * context
    width = 2 if precision == "bfloat16" else 4
    wide = size if isinstance(config, EncoderConfig) else config.num_attention_heads * config.head_dim
    # Half of what looks back alone is masked.
    attention = (12 if isinstance(config, EncoderConfig) else 6) * config.num_hidden_layers * wide * context
    head = 6.0 * (1 - head_share) * config.vocab_size * size
    flops = (6.0 * trained + 4.0 * (parameters - trained) + attention - head) * tokens
    micro_tokens = tokens // grad_accumulation
    kept = (10 * size + 3 * config.intermediate_size) * width + config.num_attention_heads * context * width
    rate = _RATES.get(device, _RATES["cpu"])[precision]
    estimated = flops * steps / rate if steps else seconds
    return Plan(
        parameters=parameters,
        embedding_parameters=embedding,
        steps=steps,
        tokens_per_step=tokens,
        train_tokens=steps * tokens if steps else None,
        epochs=steps * tokens / corpus_tokens if steps and corpus_tokens else None,
        weight_bytes=4 * trained + width * (parameters - trained),
        gradient_bytes=4 * trained,
        optimizer_bytes=4 * matrix_parameters + 8 * (trained - matrix_parameters),
        activation_bytes=micro_tokens * config.num_hidden_layers * kept + micro_tokens * size * 8,
        flops_per_step=flops,
        estimated_seconds=min(estimated, seconds) if estimated and seconds else estimated,
        checkpoint_bytes=8 * trained + 4 * matrix_parameters + 8 * (trained - matrix_parameters),
    )


def compile_pays(plan: Plan) -> bool:
    """Whether the run is long enough for torch.compile to earn back its start."""
    return plan.estimated_seconds is not None and plan.estimated_seconds >= _COMPILE_PAYS_SECONDS
