"""Fine-tuning on texts and their summaries: the first summary of a text is what is to be said.

Invariant: a summary is one paragraph, as the end of what `summarize` reads of the model's words.
"""

from __future__ import annotations

import re

from llmcli.data.examples import Example, SummaryExample
from llmcli.data.task_prompts import SUMMARY_STOP, summary_parts
from llmcli.operations.task_prompted import Asked, PromptedTask, of_another_task

_BLANK_LINES = re.compile(r"\s*\n\s*\n\s*")


class SummarizeTask(PromptedTask):
    """Summaries, by a decoder."""

    name = "summarize"
    stop = SUMMARY_STOP

    def asked(self, example: Example) -> Asked:
        """The text, and its summary."""
        if not isinstance(example, SummaryExample):
            raise of_another_task(example, "text with a summary")
        return Asked(summary_parts(example.source), _BLANK_LINES.sub("\n", example.targets[0].strip()))
