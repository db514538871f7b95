"""stories260K, a real trained model (TinyStories; llama2.c's format), as a Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("LLMCLI_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"


def reference() -> dict[str, Any]:
    """What the model gives, computed elsewhere."""
    if not STORIES.is_dir():
        pytest.skip("needs the data of shared/data")
    content: dict[str, Any] = json.loads((STORIES / "reference.json").read_text())
    return content


def make_stories(folder: Path) -> Path:
    """Converts it, as a user would."""
    from llmcli.operations.convert import convert

    list(convert(STORIES / "stories260K.bin", folder))
    return folder
