"""`--prompt-cache`: a prompt that is read once; the next call takes what of it is the same from a file.

Invariant: a file is written once and never changed; one of another model or another prompt is refused, not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmcli.errors import DataError, UsageError
from llmcli.files.prompt_cache import CachedPrompt, model_key, prefix_of, read_prompt, write_prompt
from llmcli.runtime.prefix import Prefix, common_length
from llmcli.runtime.session import Logits, Session

_LEAST = 2  # tokens that must be shared: nearly all prompts of a model begin with the same one


class PromptCache:
    """A file with the begin of a prompt."""

    def __init__(self, path: str | Path, model: Path, quantize: str | None = None) -> None:
        """`model`: its folder; `quantize`: as it is opened, which makes another model of it.

        Raises UsageError for a file of another model, DataError for one that is damaged.
        """
        self.path = Path(path)
        self._key = model_key(model, quantize)
        self._prompt: CachedPrompt | None = None
        self.reused = 0  # tokens of the last prompt that came from the file
        if self.path.exists():
            self._prompt = read_prompt(self.path)
            if self._prompt.model != self._key:
                raise UsageError("is the prompt cache of another model; name another file", where=str(path))

    def fill(self, prefix: Prefix, ids: Sequence[int]) -> None:
        """Puts into the session what the file holds of the prompt. Raises UsageError where that is nothing."""
        self.reused = 0
        if self._prompt is None:
            return
        common = common_length(self._prompt.ids, ids)
        if common < min(_LEAST, len(ids)):
            raise UsageError("holds another prompt, which begins otherwise; name another file", where=str(self.path))
        try:
            prefix.session.import_row(prefix_of(self._prompt.states, common))
        except DataError as error:
            raise DataError(f"does not fit the model: {error.message}", where=str(self.path)) from error
        prefix.held = list(ids[:common])
        self.reused = min(common, len(ids) - 1)

    def keep(self, session: Session, ids: Sequence[int]) -> None:
        """Writes the file for a prompt that the session holds, where there is none yet."""
        if self._prompt is None:
            self._prompt = CachedPrompt(self._key, list(ids), list(session.export_row(0)))
            write_prompt(self.path, self._prompt)

    def prefill(self, session: Session, ids: Sequence[int]) -> Logits:
        """Reads a prompt into a session's one row, from the file as far as it goes: (1, V)."""
        prefix = Prefix(session)
        self.fill(prefix, ids)
        logits = prefix.prefill(ids)
        self.keep(session, ids)
        return logits
