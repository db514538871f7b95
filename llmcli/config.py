"""Settings of the commands and operations: one frozen dataclass each; `llmcli.settings` says how they work."""

from __future__ import annotations

import dataclasses

from llmcli.config_bench import BenchConfig as BenchConfig
from llmcli.config_convert import ConvertConfig as ConvertConfig
from llmcli.config_embed import EmbedConfig as EmbedConfig
from llmcli.config_embed import IndexConfig as IndexConfig
from llmcli.config_embed import SearchConfig as SearchConfig
from llmcli.config_evaluate import EvaluateConfig as EvaluateConfig
from llmcli.config_export import ExportConfig as ExportConfig
from llmcli.config_finetune import AnswerTuneConfig as AnswerTuneConfig
from llmcli.config_finetune import ClassifyConfig as ClassifyConfig
from llmcli.config_finetune import ClassifyTuneConfig as ClassifyTuneConfig
from llmcli.config_finetune import EmbedTuneConfig as EmbedTuneConfig
from llmcli.config_finetune import FinetuneConfig as FinetuneConfig
from llmcli.config_finetune import LabelledConfig as LabelledConfig
from llmcli.config_finetune import LoraConfig as LoraConfig
from llmcli.config_finetune import PreferTuneConfig as PreferTuneConfig
from llmcli.config_finetune import SweepConfig as SweepConfig
from llmcli.config_generation import AnswerConfig as AnswerConfig
from llmcli.config_generation import ChatConfig as ChatConfig
from llmcli.config_generation import ConstraintConfig as ConstraintConfig
from llmcli.config_generation import FillMaskConfig as FillMaskConfig
from llmcli.config_generation import SpeculationConfig as SpeculationConfig
from llmcli.config_generation import SummarizeConfig as SummarizeConfig
from llmcli.config_objective import ObjectiveConfig as ObjectiveConfig
from llmcli.settings import check as check
from llmcli.settings import from_mapping as from_mapping
from llmcli.settings import nearest as nearest
from llmcli.settings import read_toml as read_toml
from llmcli.settings import setting
from llmcli.settings import to_toml as to_toml

# ----------------------------------------------------------------------------------------------------------------
# Settings that several commands share


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How text is read from files."""

    text_field: str = setting(
        "text",
        "Field (JSON, JSONL, parquet) or column (CSV, TSV) that holds the text.",
        group="Reading",
        metavar="NAME",
    )
    encoding: str = setting(
        "auto",
        "Encoding of the input; auto takes the mark, then UTF-8, then detects.",
        group="Reading",
        metavar="auto|NAME",
    )
    errors: str = setting(
        "strict",
        "Bytes that the encoding does not have: stop, or replace them.",
        group="Reading",
        choices=("strict", "replace"),
    )
    split_on: str = setting(
        "file",
        "What ends a document in a text file: the file, a blank line, each line, or the TEXT given.",
        group="Reading",
        metavar="file|blank|line|TEXT",
    )


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How a tokenizer is trained."""

    kind: str = setting(
        "bpe",
        "bpe and unigram work on bytes and know every text; wordpiece is BERT's; char has one token a character.",
        group="Tokenizer",
        choices=("bpe", "unigram", "wordpiece", "char"),
    )
    vocab_size: int | None = setting(
        None, "Tokens, special ones included (default: 8192; char: every character).", group="Tokenizer", minimum=2
    )
    special_tokens: tuple[str, ...] = setting(
        (),
        "A further special token; may be given again. <|endoftext|> is always there.",
        group="Tokenizer",
        flag="--special-token",
        metavar="TEXT",
    )
    encoder: bool = setting(
        False,
        "For an encoder: [PAD], [UNK], [CLS], [SEP] and [MASK] in place of <|endoftext|>, a text framed by [CLS] and "
        "[SEP].",
        group="Tokenizer",
    )
    lowercase: bool = setting(False, "Read text in small letters and without accents (wordpiece).", group="Tokenizer")
    min_frequency: int | None = setting(
        None,
        "Pairs (char: characters) that are rarer are left out (default: 2; char: 1).",
        group="Tokenizer",
        minimum=1,
    )
    max_chars: int | None = setting(
        None,
        "Use at most so many characters, spread over the whole input where its size is known.",
        group="Amount",
        minimum=1,
    )
    doc_cap: int | None = setting(None, "Use at most so many characters of each document.", group="Amount", minimum=1)
    seed: int = setting(0, "Of the choice that --max-chars makes.", group="Amount", minimum=0, maximum=2**63 - 1)


# ----------------------------------------------------------------------------------------------------------------
# Corpora


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """How documents become a corpus."""

    val_fraction: float = setting(
        0.05, "Share of the text held out for validation; 0: none.", group="Corpus", minimum=0, maximum=0.9
    )
    val_by: str = setting(
        "auto",
        "Held out by the hash of each document, or the tail; auto: the hash where there are enough documents.",
        group="Corpus",
        choices=("auto", "hash", "tail"),
    )
    dedup: str = setting(
        "off",
        "Drop documents that are equal to an earlier one, or nearly so.",
        group="Corpus",
        choices=("off", "exact", "near"),
    )
    min_chars: int = setting(1, "Drop documents of fewer characters.", group="Corpus", minimum=0)
    sentences: bool = setting(
        False,
        "Write the sentences of what is trained on too, behind the last text, each once, as documents of their own, in "
        "a drawn order: a small model judges single sentences better so.",
        group="Corpus",
    )
    scrub_pii: bool = setting(
        False,
        "Replace e-mail addresses, phone and card numbers, IBANs and IP addresses by labels such as [EMAIL].",
        group="Corpus",
    )
    dtype: str = setting(
        "auto", "Of the ids; auto: the smaller that fits.", group="Corpus", choices=("auto", "uint16", "uint32")
    )
    seed: int = setting(
        0, "Of the split by hash, and of the order of sentences.", group="Corpus", minimum=0, maximum=2**63 - 1
    )
    workers: int | None = setting(
        None, "Processes that encode (default: the cores this process may use).", group="Machine", minimum=1
    )


# ----------------------------------------------------------------------------------------------------------------
# Pretraining


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How a model is pretrained. None means: decided from the rest, and written down in the run's config.toml."""

    family: str | None = setting(
        None,
        "Model family (default: qwen3; of an encoder bert).",
        group="Model",
        choices=("qwen3", "llama", "qwen2", "mistral", "gpt2", "bert", "roberta", "distilbert"),
    )
    preset: str | None = setting(
        None, "Shape by size, see the table; 4m where no shape is given.", group="Model", metavar="NAME"
    )
    layers: int | None = setting(None, "Blocks.", group="Model", minimum=1, maximum=1000)
    hidden_size: int | None = setting(None, "Width of the hidden states.", group="Model", minimum=2)
    heads: int | None = setting(None, "Attention heads.", group="Model", minimum=1)
    kv_heads: int | None = setting(
        None, "Key/value heads that they share (default: as many).", group="Model", minimum=1
    )
    ffn_size: int | None = setting(None, "Width inside the feed-forward part.", group="Model", minimum=1)
    context: int | None = setting(
        None,
        "Tokens that the model sees at once; where a run has minutes, 128 teach more than 512.",
        group="Model",
        minimum=2,
    )
    tie_embeddings: bool = setting(True, "One matrix for embedding and head.", group="Model")

    tokenizer: str | None = setting(None, "Tokenizer to use; else one is trained.", group="Text", metavar="DIR")
    kind: str | None = setting(
        None,
        "Tokenizer to train (default: bpe; for an encoder wordpiece).",
        group="Text",
        choices=("bpe", "unigram", "wordpiece", "char"),
    )
    lowercase: bool = setting(False, "It reads text in small letters and without accents (wordpiece).", group="Text")
    vocab_size: int | None = setting(None, "Its vocabulary (default: the preset's).", group="Text", minimum=2)
    val_fraction: float = setting(
        0.05, "Share of the text held out for validation.", group="Text", minimum=0, maximum=0.9
    )
    val_by: str = setting(
        "auto", "Held out by each document's hash, or the tail.", group="Text", choices=("auto", "hash", "tail")
    )

    max_steps: int | None = setting(None, "Stop after so many steps.", group="Length", minimum=1, maximum=2**63 - 1)
    max_tokens: int | None = setting(None, "Stop after so many tokens.", group="Length", minimum=1, maximum=2**63 - 1)
    epochs: float | None = setting(
        None, "Stop after so many passes over the text.", group="Length", above=0, maximum=1e9
    )
    max_seconds: float | None = setting(
        None, "Stop after so many seconds, validation included.", group="Length", above=0
    )

    batch_size: int | None = setting(
        None, "Rows of a step (default: the preset's).", group="Training", minimum=1, maximum=1 << 20
    )
    grad_accumulation: int = setting(1, "Pieces that a step's rows are worked off in.", group="Training", minimum=1)
    optimizer: str = setting("muon", "For the matrices of the blocks.", group="Training", choices=("muon", "adamw"))
    learning_rate: float | None = setting(
        None,
        "Peak, for the blocks (default: 0.02 muon, 0.002 adamw).",
        group="Training",
        aliases=("--lr",),
        above=0,
        maximum=1e30,
    )
    embedding_learning_rate: float | None = setting(
        None,
        "Peak, for embedding, head and norms (default: 0.008 muon, as the blocks adamw).",
        group="Training",
        above=0,
        maximum=1e30,
    )
    warmup_steps: int | None = setting(
        None, "Steps of rising rate (default: 2 %, 10 to 500).", group="Training", minimum=0
    )
    decay_fraction: float = setting(
        0.5, "Share of the run, at its end, in which the rate falls to 0.", group="Training", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay of the matrices.", group="Training", minimum=0)
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this norm; 0: never.", group="Training", minimum=0
    )
    seed: int = setting(0, "Of weights and data order.", group="Training", minimum=0, maximum=2**63 - 1)

    eval_every: int | None = setting(
        None, "Steps between validations (default: 4 to 20 in all).", group="Validation", minimum=1
    )
    eval_tokens: int | None = setting(None, "Tokens of a validation (default: 65,536).", group="Validation", minimum=1)
    patience: int = setting(
        0, "Stop after so many validations without a better one; 0: never.", group="Validation", minimum=0
    )

    save_every: int | None = setting(
        None, "Steps between checkpoints (default: as validations).", group="Saving", minimum=1
    )
    save_total_limit: int = setting(2, "Checkpoints that are kept; 0: all.", group="Saving", minimum=0)

    device: str = setting("auto", "Where to train.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
    precision: str = setting(
        "auto",
        "Of the activations; auto: bfloat16 where the hardware has it.",
        group="Machine",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = setting(
        "auto",
        "torch.compile; auto: where a compiler is there and the run is long enough to pay.",
        group="Machine",
        choices=("auto", "on", "off"),
    )


# ----------------------------------------------------------------------------------------------------------------
# Generation


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. The order is: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = setting(
        0.8,
        "Flattens (above 1) or sharpens what is drawn from; 0: always the most probable.",
        group="Sampling",
        aliases=("--temp",),
        minimum=0,
        maximum=100,
    )
    top_k: int = setting(0, "Draw from the k most probable tokens; 0: all.", group="Sampling", minimum=0)
    top_p: float = setting(
        0.95,
        "Draw from the most probable tokens that make up this share; 1: all.",
        group="Sampling",
        above=0,
        maximum=1,
    )
    min_p: float = setting(
        0.0,
        "Draw from tokens of at least this share of the likeliest one's probability.",
        group="Sampling",
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float = setting(
        1.0, "Above 1: tokens that occurred become less likely.", group="Sampling", minimum=0.01, maximum=100
    )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How prompts are continued."""

    max_new_tokens: int = setting(
        256, "Tokens of a sample at most.", group="Generation", aliases=("--max-tokens",), minimum=1
    )
    stop: tuple[str, ...] = setting(
        (), "End a sample before this text; may be given again.", group="Generation", metavar="TEXT"
    )
    num_samples: int = setting(
        1, "Samples of each prompt.", group="Generation", aliases=("-n",), minimum=1, maximum=10_000
    )
    seed: int | None = setting(
        None,
        "Of what is drawn (default: a new one, named on stderr).",
        group="Generation",
        minimum=0,
        maximum=2**63 - 1,
    )
    logprobs: int | None = setting(
        None,
        "Report each token's log-probability and the N most probable in its place.",
        group="Generation",
        metavar="N",
        minimum=0,
        maximum=1000,
    )
    ignore_eos: bool = setting(False, "Go on after the end of the text.", group="Generation")
    truncate: bool = setting(False, "Keep the end of a prompt that is longer than the context.", group="Generation")
    batch_size: int = setting(8, "Rows at once.", group="Machine", minimum=1, maximum=4096)
    fast: bool = setting(
        False,
        "Let guesses share a run with their text where rounding shows: it may then differ.",
        group="Machine",
    )
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    quantize: str | None = setting(
        None, "Round the weights as they are read (not of ONNX folders).", group="Machine", choices=("int8", "int4")
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )


# ----------------------------------------------------------------------------------------------------------------
# Completion


@dataclasses.dataclass(frozen=True)
class CompleteConfig:
    """How a prefix is completed."""

    count: int = setting(5, "How many completions.", group="Completion", aliases=("-n",), minimum=1, maximum=1000)
    until: str = setting("word", "Where a completion ends.", group="Completion", choices=("word", "line"))
    max_new_tokens: int = setting(
        24, "Tokens after which a completion is cut.", group="Completion", aliases=("--max-tokens",), minimum=1
    )
    truncate: bool = setting(False, "Keep the end of a prefix that is longer than the context.", group="Completion")
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    quantize: str | None = setting(
        None, "Round the weights as they are read (not of ONNX folders).", group="Machine", choices=("int8", "int4")
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
