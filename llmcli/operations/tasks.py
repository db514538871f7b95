"""What a task is to fine-tuning: what an example becomes, the loss, the figures of a validation.

Invariant: everything else (reading, splitting, packing, the loop, checkpoints) knows no task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmcli.data.examples import Example
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import UsageError
from llmcli.models.text_model import TextModel, holds_encoder
from llmcli.operations.records import Progress
from llmcli.training.loop import Validation
from llmcli.training.packing import Packed

Ids = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """An example as ids, and what is wanted of it, in the task's own form."""

    ids: Ids
    wanted: Any
    where: str

    @property
    def longest(self) -> int:
        """Ids of its longest text: what must fit in the model's context."""
        return len(self.ids)

    @property
    def together(self) -> bytes:
        """What rows have in common that are held out together, or not."""
        return self.ids.tobytes()


class Task(Protocol):
    """One kind of fine-tuning. Made anew for each run; `settle` is called before what stands below it."""

    name: str  # of the command, and of the layouts of data
    keeps: Sequence[str]  # the kinds of heads that an encoder is loaded with, if it has one

    def tokenizer(self, base: TextTokenizer) -> TextTokenizer:
        """The tokenizer of the result: the model's, with what the task needs."""

    def longest(self, context: int) -> int:
        """Ids that a row may have for a model that sees `context` tokens. Asked before anything is encoded."""

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """The rows of examples. Raises DataError for one that cannot be learnt from."""

    def cut(self, row: Row, length: int) -> Row | None:
        """A row of at most `length` ids; None where nothing is left to learn."""

    def classes(self, row: Row) -> Sequence[str]:
        """What of a row can only be measured where it was trained on; see `finetune_data`."""

    def settle(self, train: Sequence[Row], validation: Sequence[Row]) -> None:
        """Looks at all rows at once. Raises DataError for what cannot be learnt, or not be measured."""

    def model(self, base: TextModel, generator: torch.Generator) -> TextModel:
        """The model to train, from the base's weights."""

    def facts(self, tokenizer: TextTokenizer) -> Mapping[str, Any]:
        """Keys of config.json beside the model's; those that validation finds out are put in as it does."""

    def ends(self, tokenizer: TextTokenizer) -> Sequence[int]:
        """Tokens that end what the result generates, beside those that end what the base does."""

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """Inputs and targets."""

    def loss(self, model: TextModel, packed: Packed, targets: Tensor, scale: Tensor) -> Tensor:
        """The sum over the targets of their loss, times `scale`."""

    def validate(self, model: TextModel, batches: Iterable[tuple[Packed, Tensor]]) -> Validation:
        """The loss of a target in the mean, and the task's own figures; in evaluation, without gradients."""


@runtime_checkable
class Referring(Protocol):
    """A task that measures what is learnt against the model that the run begins from."""

    rate_share: float  # of the learning rate that other tasks begin with, where none is given

    def refer(self, model: TextModel, rows: Sequence[Row], run: Path, key: str) -> Iterator[Progress]:
        """Has `model`, before any step, say what it makes of the rows; or reads it from the run's folder.

        `key`: of the data and the model; what was kept under another is computed anew.
        """


@runtime_checkable
class Writing(Protocol):
    """A task whose result has files beside the model's."""

    def write(self, folder: Path) -> None:
        """Writes them into the staged folder of the model."""


def make_task(name: str, settings: Any = None, base: Path | None = None) -> Task:
    """The task of that name. `settings`: the dataclass that it alone has; `base`: the folder of the model.

    Raises UsageError where there is no such task, or none for a model of that kind.
    """
    from llmcli.operations.task_answer import AnswerTask
    from llmcli.operations.task_chat import ChatTask
    from llmcli.operations.task_classify import ClassifyTask
    from llmcli.operations.task_embed import EmbedTask
    from llmcli.operations.task_encoder_classify import EncoderClassifyTask
    from llmcli.operations.task_prefer import PreferTask
    from llmcli.operations.task_span import SpanTask
    from llmcli.operations.task_summarize import SummarizeTask

    kinds: dict[str, Callable[..., Task]] = {
        "chat": ChatTask,
        "classify": ClassifyTask,
        "answer": AnswerTask,
        "summarize": SummarizeTask,
        "prefer": PreferTask,
        "embed": functools.partial(EmbedTask, base=base),
    }
    if name not in kinds:
        raise UsageError(f"no task {name!r}; there are {', '.join(kinds)}", where="task")
    if base is not None and holds_encoder(base):
        kinds |= {"classify": EncoderClassifyTask, "answer": SpanTask}
        if name not in (known := ("classify", "answer", "embed")):
            raise UsageError(f"is an encoder, which writes no text; it learns to {', '.join(known)}", where=str(base))
    return kinds[name]() if settings is None else kinds[name](settings)
