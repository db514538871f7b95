"""A file's text, whole: for commands that work on one text.

Invariant: the text is what stands in the file, decoded and not otherwise changed, so places in it are the file's.
"""

from __future__ import annotations

from llmcli.config import TextConfig
from llmcli.data.readers import read_documents


def read_text(path: str) -> str:
    """The text of a file, or of stdin (`-`), in the encoding that its bytes tell; of JSON and tables the texts.

    Between texts stands a blank line. Raises DataError for a file that is not there, is empty, or holds no text.
    """
    parts: list[str] = []
    between = ""
    for document in read_documents([path], TextConfig()):
        parts += [between, document.text]
        between = "\n\n" if document.final else ""
    return "".join(parts)
