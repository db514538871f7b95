"""`pretrain`: a corpus, or plain text, to a model. One generator that yields what happens.

Invariant: everything that decides the result is settled before the first step and written to the run's config.toml.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcli import config as configs
from llmcli.config import CorpusConfig, PretrainConfig, TextConfig, TokenizerConfig
from llmcli.data.corpus import Corpus, open_corpus
from llmcli.data.formats import find_inputs
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.manifest import manifest_problems, versions
from llmcli.models.decoder import Decoder
from llmcli.operations import run_folder, training_run
from llmcli.operations.prepare import prepare
from llmcli.operations.pretrain_settings import Settled, settle, vocabulary_of
from llmcli.operations.records import Progress
from llmcli.operations.tokenizer import train_tokenizer
from llmcli.operations.training_run import Started
from llmcli.training.batches import TokenWindows, prefetched, validation_windows
from llmcli.training.loop import Loop, LoopSettings, TrainingEvent, TrainingState, Validation
from llmcli.training.losses import head_loss, piece_loss, summed_loss
from llmcli.training.machine import prepare_machine
from llmcli.training.optimizer import Optimizer

_BYTES_PER_TOKEN = 3.5  # a guess, for a plan of text that has no tokenizer yet


def pretrain(
    data: str | Path | Sequence[str],
    run: str | Path,
    config: PretrainConfig = PretrainConfig(),  # noqa: B008  (frozen)
    text: TextConfig = TextConfig(),  # noqa: B008
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: Collection[str] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Progress | Started | TrainingEvent, None, None]:
    """Pretrains a model in the folder `run`.

    `data`: a corpus folder, or text files (a tokenizer and a corpus are then made inside the run). `resume`: "auto"
    goes on from the newest sound checkpoint and begins anew where there is none; a path names one. The stored settings
    are then kept; `given` names those that were set on purpose (None: those that are not the default), and what may not
    change must be equal. Yields Progress while the text is prepared, then Started, then TrainingEvents. `stopping` is
    asked at every step; when it says yes the work is saved and the last record is an "end" with the reason "stopped".
    A run that fails before Started leaves what stood at its place as it was.

    Raises DataError, ConfigError and UsageError before the first step; NotFiniteError when the loss is not finite.
    """
    configs.check(config)
    configs.check(text)
    inputs = [str(data)] if isinstance(data, str | os.PathLike) else [str(item) for item in data]
    _refuse_unused(inputs, config, text)
    place = Path(run)
    again = resume is not None
    run_folder.refuse_taken(place, resume=again, overwrite=overwrite)
    if not (again and (place / "corpus").is_dir()):
        _refuse_own(inputs, config, place)  # what is wrong with DATA is said before anything is touched
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            training_run.opened(
                place, "pretrain", {"data": inputs}, [config, text], resume=again, overwrite=overwrite, given=given
            )
        )
        records = _in_folder(inputs, opened, resume, stopping)
        for record in stack.enter_context(contextlib.closing(records)):
            if isinstance(record, Started):
                opened.started()
            yield record


def plan_pretraining(
    data: str | Path | Sequence[str],
    config: PretrainConfig = PretrainConfig(),  # noqa: B008
    text: TextConfig = TextConfig(),  # noqa: B008
) -> Started:
    """The plan of a run, without doing anything. For plain text the count of tokens is a guess from its size."""
    configs.check(config)
    inputs = [str(data)] if isinstance(data, str | os.PathLike) else [str(item) for item in data]
    _refuse_unused(inputs, config, text)
    if _is_corpus(inputs):
        corpus = open_corpus(inputs[0])
        tokens, vocabulary = corpus.train_tokens, corpus.vocab_size
    else:
        size = sum(source.size or 0 for source in find_inputs(inputs))
        tokens, vocabulary = int(size * (1 - config.val_fraction) / _BYTES_PER_TOKEN), vocabulary_of(config)
        if config.tokenizer is not None:
            vocabulary = load_tokenizer(config.tokenizer).vocab_size
    settled = settle(config, vocabulary, tokens)
    return Started("", settled.plan, settled.machine, settled.shape, settled.config, None)


# ----------------------------------------------------------------------------------------------------------------
# The run


def _refuse_own(inputs: Sequence[str], config: PretrainConfig, place: Path) -> None:
    """Raises UsageError for texts, a corpus or a tokenizer in the run's own folder, DataError for what is not there."""
    if _is_corpus(inputs):
        read = list(inputs)
    else:
        sources = find_inputs(inputs)
        if config.tokenizer is None and any(source.size is None for source in sources):
            raise UsageError("a pipe is read once, a tokenizer and a corpus need two: give a file or a --tokenizer")
        read = [source.path for source in sources if source.path is not None]
    run_folder.refuse_own(place, [*read, *filter(None, [config.tokenizer])])


def _refuse_unused(inputs: Sequence[str], config: PretrainConfig, text: TextConfig) -> None:
    """Raises UsageError for a setting that says how text becomes a corpus, where DATA is one already."""
    if not _is_corpus(inputs):
        return
    asked = [(name, config, PretrainConfig()) for name in ("kind", "val_fraction", "val_by")]
    asked += [(field.name, text, TextConfig()) for field in dataclasses.fields(text)]  # type: ignore[misc]
    for name, values, default in asked:
        if getattr(values, name) != getattr(default, name):
            raise UsageError("says how text becomes a corpus, and DATA is one already: leave it out", where=name)


def _is_corpus(inputs: Sequence[str]) -> bool:
    return len(inputs) == 1 and (Path(inputs[0]) / "corpus.json").is_file()


def _corpus(
    inputs: Sequence[str], place: Path, config: PretrainConfig, text: TextConfig
) -> Iterator[Progress | Corpus]:
    """The corpus that is given, or one made of the text inside the run, with a tokenizer where none is given."""
    if _is_corpus(inputs):
        corpus = open_corpus(inputs[0])
        if config.tokenizer is not None:
            wanted = load_tokenizer(config.tokenizer).hash
            if wanted != corpus.tokenizer_hash:
                raise DataError(
                    f"was made with another tokenizer ({corpus.tokenizer_hash[:12]}) than "
                    f"{config.tokenizer} ({wanted[:12]})",
                    where=inputs[0],
                )
        if config.vocab_size not in (None, corpus.vocab_size):
            raise UsageError(f"the corpus has a vocabulary of {corpus.vocab_size}", where="vocab_size")
        yield corpus
        return
    made = place / "corpus"
    if not (made / "corpus.json").is_file() or manifest_problems(made):
        _refuse_own(inputs, config, place)  # once more: a folder of texts that the run lies in holds its files by now
        tokenizer = config.tokenizer
        if tokenizer is None:
            tokenizer = str(place / "tokenizer")
            vocabulary = config.vocab_size if config.kind == "char" else vocabulary_of(config)
            settings = TokenizerConfig(kind=config.kind, vocab_size=vocabulary)
            for step in train_tokenizer(inputs, tokenizer, text, settings, overwrite=True):
                if isinstance(step, Progress):
                    yield step
        corpus_settings = CorpusConfig(val_fraction=config.val_fraction, val_by=config.val_by)
        for record in prepare(inputs, tokenizer, made, text, corpus_settings, overwrite=True):
            if isinstance(record, Progress):
                yield record
    yield open_corpus(made)


def _in_folder(
    inputs: Sequence[str],
    opened: training_run.Opened,
    resume: str | None,
    stopping: Callable[[], bool],
) -> Generator[Progress | Started | TrainingEvent, None, None]:
    place, (config, text) = opened.place, opened.settings
    corpus: Corpus | None = None
    for record in _corpus(inputs, place, config, text):
        if isinstance(record, Corpus):
            corpus = record
        else:
            yield record
    assert corpus is not None
    settled = settle(config, corpus.vocab_size, corpus.train_tokens)
    config, machine = settled.config, settled.machine
    prepare_machine(machine)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    if tokenizer.hash != corpus.tokenizer_hash:
        raise DataError("holds another tokenizer than the one that made it", where=str(corpus.path))
    lineage = {"corpus": corpus.hash, "tokenizer": tokenizer.hash, "parent": None, "seed": config.seed, **versions()}
    run_folder.check_space(place, 2 * settled.plan.checkpoint_bytes)
    device = torch.device(machine.device)
    model = Decoder(settled.shape).init_weights(torch.Generator().manual_seed(config.seed)).to(device)
    model.compute_dtype = machine.dtype
    optimizer = Optimizer(model, kind=config.optimizer, weight_decay=config.weight_decay, dtype=machine.dtype)
    folder = run_folder.RunFolder(place, run_folder.WholeModel(model, tokenizer), lineage)
    windows = TokenWindows(
        corpus.train(),
        context=settled.shape.max_position_embeddings,
        batch_size=settled.config.batch_size // config.grad_accumulation,  # type: ignore[operator]
        seed=config.seed,
        vocab_size=corpus.vocab_size,
    )

    state, resumed, notices = training_run.gone_on(folder, resume, optimizer, machine.device, ["corpus"])
    opened.write(config, text)
    yield Started(str(place), settled.plan, machine, settled.shape, config, resumed, tuple(notices))

    loop = _loop(model, optimizer, config, settled, state, windows, corpus, tokenizer, stopping)
    yield from training_run.trained(
        loop, folder, machine=machine, limit=config.save_total_limit, validated=bool(corpus.val_tokens)
    )


def _loop(
    model: Decoder,
    optimizer: Optimizer,
    config: PretrainConfig,
    settled: Settled,
    state: TrainingState,
    windows: TokenWindows,
    corpus: Corpus,
    tokenizer: TextTokenizer,
    stopping: Callable[[], bool],
) -> Loop:
    hidden: Callable[[Tensor], Tensor] = model.hidden
    piece: Callable[..., Any] = piece_loss
    if settled.machine.compile:
        hidden = torch.compile(model.hidden, dynamic=False)
        piece = torch.compile(piece_loss, dynamic=False)
    device = torch.device(settled.machine.device)

    def loss(inputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        return head_loss(hidden(inputs), model.head, targets, scale, piece)

    return Loop(
        model=model,
        optimizer=optimizer,
        settings=LoopSettings.of(config, settled.plan.steps),
        state=state,
        batches=lambda number: prefetched(windows, number, device),
        loss=loss,
        count_targets=lambda targets: targets.numel(),
        validate=_validation(model, corpus, tokenizer, config, stopping),
        stopping=stopping,
    )


def _validation(
    model: Decoder,
    corpus: Corpus,
    tokenizer: TextTokenizer,
    config: PretrainConfig,
    stopping: Callable[[], bool],
) -> Callable[[], Validation | None]:
    """Loss in nats per token and in bits per byte of the held-out text; None without any, or when asked to stop."""
    sizes = np.array([len(tokenizer.token_bytes(index)) for index in range(corpus.vocab_size)], np.int64)
    sizes[[index for index in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) if index is not None]] = 0
    shards = [shard for shard in corpus.val() if len(shard) > 1]
    context, device = model.config.max_position_embeddings, model.embedding.device

    def validate() -> Validation | None:
        nats, tokens, size = 0.0, 0, 0
        batch = max(1, 16_384 // context)
        windows = validation_windows(
            shards,
            context=context,
            batch_size=batch,
            tokens=config.eval_tokens or 65_536,
            vocab_size=corpus.vocab_size,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for inputs, targets in windows if shards else ():
                if stopping():
                    return None
                nats += summed_loss(model.hidden(inputs.to(device)), model.head, targets.to(device))
                tokens += targets.numel()
                size += int(sizes[targets.numpy()].sum())
        return Validation(nats / tokens, nats / math.log(2) / max(size, 1)) if tokens else None

    return validate
