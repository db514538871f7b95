"""Fine-tuning on questions about texts: the first right answer is what is to be said, or that there is none.

Invariant: an answer that is cut to stays in what is left of its text.
"""

from __future__ import annotations

from llmcli.config_finetune import AnswerTuneConfig
from llmcli.data.examples import AnswerExample, Example
from llmcli.data.task_prompts import ANSWER_STOP, NO_ANSWER, answer_parts
from llmcli.errors import ConfigError
from llmcli.operations.task_prompted import Asked, PromptedTask, of_another_task


class AnswerTask(PromptedTask):
    """SQuAD's questions, on a decoder."""

    name = "answer"
    stop = ANSWER_STOP

    def __init__(self, config: AnswerTuneConfig = AnswerTuneConfig()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        if config != AnswerTuneConfig():
            raise ConfigError("is of encoders, which read a text in windows; this is a decoder", where="doc_stride")

    def asked(self, example: Example) -> Asked:
        """The question, and its answer in one line."""
        if not isinstance(example, AnswerExample):
            raise of_another_task(example, "question about a text")
        parts = answer_parts(example.context, example.question)
        if not example.answers:
            return Asked(parts, NO_ANSWER)
        text, start = example.answers[0]
        return Asked(parts, " ".join(text.split()), (start, start + len(text)))
