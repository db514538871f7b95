"""Checkpoints of a run: folders `checkpoints/step-00000500/`, each whole or absent, each with a manifest.

Invariant: the latest checkpoint is the newest folder that verifies, never the greatest number in a name
(transformers #35580), and keeping fewer never removes the newest sound one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmcli.files.artefacts import CHECKPOINTS, checkpoints_of
from llmcli.files.atomic import remove_debris, remove_folder, staged_folder
from llmcli.files.manifest import manifest_problems, write_manifest

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], lineage: Mapping[str, Any]) -> Path:
    """Writes a checkpoint: `write(folder)` fills it, the manifest is written last, then it gets its name."""
    place = checkpoint_path(run, step)
    with staged_folder(place, overwrite=True) as folder:
        write(folder)
        write_manifest(folder, lineage)
    return place


def latest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and a line for each newer one that was passed over because it is damaged."""
    remove_debris(run / CHECKPOINTS)
    passed: list[str] = []
    for place in reversed(checkpoints_of(run)):
        problems = manifest_problems(place)
        if not problems:
            return place, passed
        passed.append(f"{place.name} is damaged ({problems[0]})")
    return None, passed


def keep_newest(run: Path, limit: int) -> None:
    """Removes the oldest checkpoints beyond `limit` (0: keeps all). The newest was just written and verified."""
    if limit > 0:
        for place in checkpoints_of(run)[:-limit]:
            remove_folder(place)
