"""What the model that a preference run began from gives each answer, kept in the run's folder.

Invariant: what is read was computed for these examples by this model, or nothing is read; the file appears whole or not
at all. `log_probabilities` is (examples, 2), float32: nats of the better answer and of the worse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.errors import LlmcliError
from llmcli.files.atomic import write_file
from llmcli.files.safetensors_header import read_header

REFERENCE = "reference.safetensors"
_NAME = "log_probabilities"

Array = npt.NDArray[np.float32]


def write_reference(path: Path, values: Array, key: str) -> None:
    """Writes the figures of all examples. `key`: of the data and of the model."""
    from safetensors.numpy import save

    write_file(path, save({_NAME: np.ascontiguousarray(values, np.float32)}, {"key": key}))  # one fact: order is chance


def read_reference(path: Path, key: str, examples: int) -> Array | None:
    """What `write_reference` wrote; None where there is nothing, or nothing sound of this key."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        read_header(path)  # by our own checks first
        with safe_open(str(path), framework="numpy") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            values: npt.NDArray[Any] = file.get_tensor(_NAME)
    except (LlmcliError, SafetensorError, OSError, ValueError, TypeError):
        return None
    sound = values.shape == (examples, 2) and values.dtype == np.float32 and bool(np.isfinite(values).all())
    return values if sound else None
