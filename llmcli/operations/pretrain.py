"""`pretrain`: a corpus, or plain text, to a model. One generator that yields what happens.

Invariant: everything that decides the result is settled before the first step and written to the run's config.toml.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path

from llmcli import config as configs
from llmcli.config import CorpusConfig, ObjectiveConfig, PretrainConfig, TextConfig, TokenizerConfig
from llmcli.data.corpus import Corpus, open_corpus
from llmcli.data.formats import find_inputs
from llmcli.data.frames import framed
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.manifest import manifest_problems
from llmcli.models.decoder import Decoder
from llmcli.models.encoder_heads import MaskedLM
from llmcli.operations import run_folder, training_run
from llmcli.operations.prepare import prepare
from llmcli.operations.pretrain_base import Base, built, open_base
from llmcli.operations.pretrain_causal import causal_work
from llmcli.operations.pretrain_contrastive import Prepared, in_contrast, prepared_contrast
from llmcli.operations.pretrain_masked import masked_work
from llmcli.operations.pretrain_settings import Settled, check_objective, kind_of, settle, vocabulary_of
from llmcli.operations.pretrain_work import Work, run_work
from llmcli.operations.records import Progress
from llmcli.operations.tokenizer import train_tokenizer
from llmcli.operations.training_run import Started
from llmcli.training.loop import TrainingEvent
from llmcli.training.machine import prepare_machine

_BYTES_PER_TOKEN = 3.5  # a guess, for a plan of text that has no tokenizer yet


def pretrain(
    data: str | Path | Sequence[str],
    run: str | Path,
    config: PretrainConfig = PretrainConfig(),  # noqa: B008  (frozen)
    text: TextConfig = TextConfig(),  # noqa: B008
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008
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
    for each in (config, text, objective):
        configs.check(each)
    check_objective(config, objective)
    inputs = [str(data)] if isinstance(data, str | os.PathLike) else [str(item) for item in data]
    _refuse_unused(inputs, config, text, objective)
    place = Path(run)
    again = resume is not None
    run_folder.refuse_taken(place, resume=again, overwrite=overwrite)
    if not (again and (place / "corpus").is_dir()):
        _refuse_own(inputs, config, objective, place)  # what is wrong with DATA is said before anything is touched
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            training_run.opened(
                place,
                "pretrain",
                {"data": inputs},
                [config, text, objective],
                resume=again,
                overwrite=overwrite,
                given=given,
            )
        )
        contrastive = opened.settings[2].objective == "contrastive"
        records = (in_contrast if contrastive else _in_folder)(inputs, opened, resume, stopping)
        for record in stack.enter_context(contextlib.closing(records)):
            if isinstance(record, Started):
                opened.started()
            yield record


def plan_pretraining(
    data: str | Path | Sequence[str],
    config: PretrainConfig = PretrainConfig(),  # noqa: B008
    text: TextConfig = TextConfig(),  # noqa: B008
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008
) -> Started:
    """The plan of a run, without doing anything. For plain text the count of tokens is a guess from its size."""
    for each in (config, text, objective):
        configs.check(each)
    check_objective(config, objective)
    inputs = [str(data)] if isinstance(data, str | os.PathLike) else [str(item) for item in data]
    _refuse_unused(inputs, config, text, objective)
    if objective.objective == "contrastive":
        for record in prepared_contrast(inputs, config, text, objective):
            if isinstance(record, Prepared):
                settled = record.settled
                begun = built(settled, record.tokenizer, open_base(objective.init or ""))[1]
                told = {"data": record.data.described(), **begun}
                return Started("", settled.plan, settled.machine, settled.shape, settled.config, None, facts=told)
    base = None if objective.init is None else open_base(objective.init)
    own: TextTokenizer | None
    if _is_corpus(inputs):
        corpus = open_corpus(inputs[0])
        settled, own = _settled(config, objective, corpus, load_tokenizer(corpus.tokenizer_path), base)
    else:
        size = sum(source.size or 0 for source in find_inputs(inputs))
        tokens, vocabulary = int(size * (1 - config.val_fraction) / _BYTES_PER_TOKEN), vocabulary_of(config, objective)
        path, own = _tokenizer_path(config, base), None
        if path is not None:
            given = load_tokenizer(path)
            own = given if objective.objective == "causal" else framed(given)
        shape = None if base is None else base.shape
        vocabulary = vocabulary if own is None else own.vocab_size
        settled = settle(config, vocabulary, tokens, objective, base=shape, tokenizer=own)
    facts = built(settled, own, base)[1] if base is not None and own is not None else {}
    return Started("", settled.plan, settled.machine, settled.shape, settled.config, None, facts=facts)


# ----------------------------------------------------------------------------------------------------------------
# The run


def _refuse_own(inputs: Sequence[str], config: PretrainConfig, objective: ObjectiveConfig, place: Path) -> None:
    """Raises UsageError for texts, a corpus or a tokenizer in the run's own folder, DataError for what is not there."""
    if _is_corpus(inputs):
        read = list(inputs)
    else:
        sources = find_inputs(inputs)
        if config.tokenizer is None and objective.init is None and any(source.size is None for source in sources):
            raise UsageError("a pipe is read once, a tokenizer and a corpus need two: give a file or a --tokenizer")
        read = [source.path for source in sources if source.path is not None]
    run_folder.refuse_own(place, [*read, *filter(None, [config.tokenizer, objective.init])])


def _tokenizer_path(config: PretrainConfig, base: Base | None) -> str | None:
    """The tokenizer for text: the one that is given, else that of the model that is begun from; None: one is made."""
    return config.tokenizer or (None if base is None else str(base.folder))


def _refuse_unused(inputs: Sequence[str], config: PretrainConfig, text: TextConfig, objective: ObjectiveConfig) -> None:
    """Raises UsageError for a setting that says how text becomes a corpus, where DATA is one, or must not be one."""
    if not _is_corpus(inputs):
        return
    if objective.objective == "contrastive":
        raise UsageError("is a corpus, which has no sentences any more; give its text", where=inputs[0])
    usual = PretrainConfig(kind=kind_of(PretrainConfig(), objective))
    config = dataclasses.replace(config, kind=kind_of(config, objective))
    asked = [(name, config, usual) for name in ("kind", "lowercase", "val_fraction", "val_by")]
    asked += [(field.name, text, TextConfig()) for field in dataclasses.fields(text)]  # type: ignore[misc]
    for name, values, default in asked:
        if getattr(values, name) != getattr(default, name):
            raise UsageError("says how text becomes a corpus, and DATA is one already: leave it out", where=name)


def _is_corpus(inputs: Sequence[str]) -> bool:
    return len(inputs) == 1 and (Path(inputs[0]) / "corpus.json").is_file()


def _corpus(
    inputs: Sequence[str],
    place: Path,
    config: PretrainConfig,
    text: TextConfig,
    objective: ObjectiveConfig,
    base: Base | None,
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
        _refuse_own(inputs, config, objective, place)  # once more: a folder of texts that holds the run has its files
        tokenizer = _tokenizer_path(config, base)
        if tokenizer is None:
            tokenizer = str(place / "tokenizer")
            encoder = objective.objective != "causal"
            kind = kind_of(config, objective)
            vocabulary = config.vocab_size if kind == "char" else vocabulary_of(config, objective)
            settings = TokenizerConfig(kind=kind, vocab_size=vocabulary, encoder=encoder, lowercase=config.lowercase)
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
    place, (config, text, objective) = opened.place, opened.settings
    base = None if objective.init is None else open_base(objective.init)
    corpus: Corpus | None = None
    for record in _corpus(inputs, place, config, text, objective, base):
        if isinstance(record, Corpus):
            corpus = record
        else:
            yield record
    assert corpus is not None
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    if tokenizer.hash != corpus.tokenizer_hash:
        raise DataError("holds another tokenizer than the one that made it", where=str(corpus.path))
    settled, tokenizer = _settled(config, objective, corpus, tokenizer, base)
    config, machine = settled.config, settled.machine
    prepare_machine(machine)
    run_folder.check_space(place, 2 * settled.plan.checkpoint_bytes)
    model, facts = built(settled, tokenizer, base)
    work: Work
    if isinstance(model, Decoder):
        work = causal_work(settled, model, corpus, tokenizer, stopping)
    else:
        assert isinstance(model, MaskedLM)
        work = masked_work(settled, model, corpus, tokenizer, stopping)
    origins = {"corpus": corpus.hash, "tokenizer": tokenizer.hash, "parent": None if base is None else base.hash}
    yield from run_work(work, settled, opened, text, origins, facts, resume, stopping)


def _settled(
    config: PretrainConfig, objective: ObjectiveConfig, corpus: Corpus, tokenizer: TextTokenizer, base: Base | None
) -> tuple[Settled, TextTokenizer]:
    """The settings, and the tokenizer of the model: an encoder's has a frame."""
    vocabulary = corpus.vocab_size
    if objective.objective != "causal":
        tokenizer = framed(tokenizer)
        vocabulary = max(vocabulary, tokenizer.vocab_size)
    shape = None if base is None else base.shape
    settled = settle(config, vocabulary, corpus.train_tokens, objective, base=shape, tokenizer=tokenizer)
    known = dataclasses.replace(settled.config, vocab_size=config.vocab_size or corpus.vocab_size)
    return dataclasses.replace(settled, config=known), tokenizer
