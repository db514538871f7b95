"""A model that is evaluated: how probable it finds ends of texts, and what it writes after prompts.

Invariant: the numbers of an example depend on no other (but for rounding), and writing is greedy, so they come again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from llmcli.config import EvaluateConfig, GenerateConfig, SamplingConfig
from llmcli.data.cut_prompts import cut_prompt
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError, LlmcliError
from llmcli.files.artefacts import Model, end_ids, find_model, is_onnx, read_json
from llmcli.models.encoder_config import is_encoder
from llmcli.operations.generate import Failed, Generated, Generator, Prompt
from llmcli.runtime.scoring import score_ends
from llmcli.runtime.session import Session

POOL = 512  # sequences that are scored together, sorted by length


class EvaluatedModel:
    """A model folder or a run. Its weights are loaded when they are first needed."""

    def __init__(self, model: Model, config: EvaluateConfig) -> None:
        self.model, self.name, self.config = model, str(model), config
        self.place = find_model(model)
        self.tokenizer: TextTokenizer = load_tokenizer(self.place.texts)
        begin = self.tokenizer.begin_id
        self.begin = [] if begin is None else [begin]  # what stands before a text

    @property
    def is_onnx(self) -> bool:
        """Whether it is a graph."""
        return is_onnx(self.place.folder)

    @property
    def is_encoder(self) -> bool:
        """Whether it reads texts and writes none."""
        return is_encoder(read_json(self.place.folder / "config.json"))

    @functools.cached_property
    def session(self) -> Session:
        """The model itself."""
        from llmcli.runtime.open import open_session

        if self.is_encoder:
            raise DataError("is an encoder, which gives texts no probability and writes none", where=self.name)
        config = self.config
        session = open_session(self.place, device=config.device, threads=config.threads, quantize=config.quantize)
        if self.tokenizer.vocab_size > session.vocab_size:
            raise DataError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {session.vocab_size}")
        return session

    def close(self) -> None:
        """Lets memory go."""
        if "session" in self.__dict__:
            self.session.close()

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], given: Sequence[int]
    ) -> list[npt.NDArray[np.float32]]:
        """Of each sequence's ids from number given[i] on, in nats. Raises LlmcliError where they are not numbers."""
        arrays = [np.asarray(ids, np.int64) for ids in sequences]
        found = score_ends(self.session, arrays, given, self.config.batch_size)
        if not all(np.isfinite(values).all() for values in found):
            raise LlmcliError("the model's predictions are not finite: its weights are broken")
        return found

    def ends(self, prompt: str, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """The ids of a prompt with each of some texts behind it, and from which number on they are scored.

        That is where the first of them leaves the prompt's ids: a text may run into the prompt's last token, and then
        all of them are scored from that token on, so that they stay comparable.
        """
        encode = self.tokenizer.encode
        before = encode(prompt) if prompt else []
        sequences = [encode(prompt + text) for text in texts]
        shared = min(_shared(before, ids) for ids in sequences)
        return [[*self.begin, *ids] for ids in sequences], max(1, len(self.begin) + shared)

    def written(
        self, prompts: Iterable[tuple[str, str, str]], stop: str, max_new_tokens: int, places: Sequence[str]
    ) -> Iterator[tuple[str, bool]]:
        """What follows each prompt (its three parts), up to `stop`, and whether its middle part had to be cut."""
        limit = max(1, min(max_new_tokens, self.session.context // 2))
        generator = Generator(self.session, self.tokenizer, end_ids(self.place.texts))
        cuts: dict[int, bool] = {}

        def fitted() -> Iterator[Prompt]:
            for number, parts in enumerate(prompts):
                text, cuts[number] = self.fitted(parts, self.session.context - limit, places[number])
                yield Prompt(text, number)

        config = GenerateConfig(max_new_tokens=limit, stop=(stop,), batch_size=self.config.batch_size or 8, seed=0)
        for record in generator.generate(fitted(), config, SamplingConfig(temperature=0.0)):
            if isinstance(record, Failed):
                raise record.error
            if isinstance(record, Generated):
                yield record.text, cuts.pop(record.index)

    def fitted(self, parts: tuple[str, str, str], room: int, where: str) -> tuple[str, bool]:
        """A prompt of at most `room` tokens: the end of its middle part is cut off where it is too long."""
        encode = self.tokenizer.encode
        if len(encode("".join(parts), special=True)) <= room:
            return "".join(parts), False
        found = cut_prompt(self.tokenizer, parts, room)
        if found is None:
            rest = len(encode(parts[0] + parts[2], special=True))
            raise DataError(
                f"has {rest:,} tokens without the text that could be cut; there is room for {room:,}", where=where
            )
        return "".join(found), True


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with; all but the last of the second at most, so that one is left."""
    most = min(len(first), len(second) - 1)
    return next((place for place in range(most) if first[place] != second[place]), max(most, 0))
